"""Kill -9 at random moments: the store always verifies, and the next run completes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hub

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}  # scripts find hub uninstalled
SCRIPT = Path(__file__).with_name("kill_rounds.py")
MEMORY = Path("/dev/shm")  # kills, unlike power cuts, do not care for the disk, and here fsync costs nothing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def rounds(tmp_path: Path, job: str, *options: str) -> dict[str, float]:
    import tempfile

    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as directory:
        command = [sys.executable, str(SCRIPT), job, directory, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("job", ["push", "pull"])
def test_a_hundred_kills(tmp_path: Path, job: str) -> None:
    found = rounds(tmp_path, job, "--kills", "100", "--seed", str(os.getpid()))
    assert found["kills"] >= 100


@pytest.mark.parametrize("job", ["push", "pull"])
def test_kills_among_four_processes(tmp_path: Path, job: str) -> None:
    found = rounds(tmp_path, job, "--kills", "24", "--workers", "4", "--seed", str(os.getpid()))
    assert found["kills"] >= 24


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_five_hundred_kills_among_eight_processes(tmp_path: Path, seed: int) -> None:
    job = "push" if seed % 2 else "pull"
    assert rounds(tmp_path, job, "--kills", "100", "--workers", "8", "--seed", str(seed))["kills"] >= 100
