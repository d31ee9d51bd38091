"""The benchmarks of push and pull run and report what they promise. Nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def report(name: str, *options: str) -> dict[str, object]:
    command = [sys.executable, str(HERE / name), *options, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    assert all(str(key) in done.stderr for key in found)
    return found


def test_transfer() -> None:
    found = report("bench_hub_transfer.py", "--megabytes=1", "--rounds=1")
    assert {"push / (cp + sha256sum)", "pull / (cp + sha256sum)"} <= found.keys()
    assert all(value > 0 for value in found.values() if isinstance(value, float))


def test_latency() -> None:
    pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
    found = report("bench_hub_latency.py", "--files=3", "--kilobytes=1", "--latency=0", "--rounds=1", "--jobs=2")
    assert found["files"] == 4
    assert {"pull: speed-up", "push: speed-up", "pull / snapshot_download"} <= found.keys()
    assert all(value > 0 for name, value in found.items() if isinstance(value, float) and name != "latency, s")
