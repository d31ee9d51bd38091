"""Kill -9 at random moments of a training run: what is resumed ends in the very artifact of the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hub

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}
SCRIPT = Path(__file__).with_name("train_kills.py")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_the_same_digest_after_kills(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--kills", str(kills), "--seed", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hits"] >= kills // 2
    assert found["whole"] == found["killed"]
