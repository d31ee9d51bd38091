"""The benchmarks of training run and report what they promise. Nothing here is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = [
    "--width=64",
    "--layers=2",
    "--vocabulary=60",
    "--rank=2",
    "--prompt=8",
    "--steps=3",
    "--rounds=1",
    "--threads=1",
]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux' /proc"
)


def bench(name, *options):
    command = [sys.executable, str(HERE / name), *SMALL, *options, "--json=-"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_many():
    found = bench("bench_many.py", "--adapters=3", "--rows=2")
    assert found["largest_loss_difference"] < 1e-4
    assert found["time_ratio"] > 0
    assert found["memory_ratio"] > 0


def test_side():
    found = bench("bench_side.py", "--rows=4", "--prompt=64")
    assert found["encoder"]["added_ratio"] > 0
    assert found["causal"]["added_ratio"] > 0


@pytest.mark.slow  # four libraries are imported twice
def test_qlora():
    found = bench("bench_qlora.py", "--rows=2")
    assert found["largest_loss_difference"] < 1e-3
    assert found["time_ratio"] > 0
    assert found["memory_ratio"] > 0
    assert found["first_and_last_loss"][1] < found["first_and_last_loss"][0]
