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


MIXED = SCRIPT.with_name("kill_mixed.py")


def rounds(tmp_path: Path, job: str | None, *options: str) -> dict[str, float]:
    import tempfile

    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as directory:
        what = [str(MIXED)] if job is None else [str(SCRIPT), job]
        command = [sys.executable, *what, directory, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=1800)
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


def test_kills_among_eight_processes_that_do_everything(tmp_path: Path) -> None:
    found = rounds(tmp_path, None, "--kills", "16", "--seed", str(os.getpid()))
    assert found["kills"] >= 16


@pytest.mark.slow
def test_five_hundred_kills_among_eight_processes_that_do_everything(tmp_path: Path) -> None:
    found = rounds(tmp_path, None, "--kills", "500")
    assert found["kills"] >= 500
    assert set(found["jobs"]) == {"publish", "fetch", "move", "yank", "waste", "gather"}
