"""`hub run` in processes of its own, killed at any moment and started again: the file is as if nothing had happened."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import main

BASE = "builtin:tiny-lm"
ADAPTERS = (None, "law", "near", "0.5 * law + code", "tasks", "mood", "arrow", "lead", "likely")
TEXTS = ("The parties agree that", "def main(", "It was a dark night and the old man of the sea had nothing", "To be")


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("routers")
def test_a_run_killed_and_started_again_ends_in_the_same_bytes(published, jsonl, tmp_path, monkeypatch, kills):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))
    rows = [{"text": TEXTS[i % 4] + " of" * (i % 3), "adapter": ADAPTERS[i % len(ADAPTERS)]} for i in range(40 * kills)]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--max-new-tokens", "4", "--batch-size", "2", "--route-weights", "--temperature", "0.7"]
    asked = ["run", str(jsonl(rows)), "--base", BASE, "--adapter-column", "adapter", *options, "--out"]
    done = CliRunner().invoke(main, [*asked, str(whole)])
    assert done.exit_code == 0, done.output

    draw = random.Random(kills)
    for kill in range(kills):
        process, seen = start(*asked, str(out)), size(out)
        if kill % 5 != 4:  # each fifth time at any moment, loading among them; else while rows are computed
            wait_until(lambda process=process, seen=seen: size(out) != seen or process.poll() is not None)
        time.sleep(draw.uniform(0, 0.4))
        assert process.poll() is None, "it had ended before it was killed"
        process.kill()
        process.wait()
    last = start(*asked, str(out))
    told = last.communicate()[1]
    assert last.returncode == 0, told
    assert kills < 20 or "going on after row" in told
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl", "whole.jsonl"]


def start(*words: str) -> subprocess.Popen[str]:
    """The console script."""
    script = Path(sys.executable).with_name("hub")
    return subprocess.Popen([script, *words], stderr=subprocess.PIPE, text=True)


def size(out: Path) -> int:
    """Bytes of the output and its journal: they grow with every batch."""
    return sum(p.stat().st_size for p in (out, out.with_name(out.name + ".journal")) if p.exists())


def wait_until(true, seconds=300.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)
