"""`hub.io.parallel`: threads that stop together, and an interrupted command that leaves at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hub.io.parallel import Stopped, Workers
from hub.store import Store


@pytest.mark.parametrize("size", [1, 3, 50])
def test_results_are_in_the_order_of_the_items(size: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert Workers(size).map(work, range(20)) == [item * item for item in range(20)]
    assert Workers(size).map(work, []) == []


def test_never_more_than_its_size() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def work(_item: int) -> None:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.002)
        with lock:
            now -= 1

    Workers(3).map(work, range(40))
    assert most == 3


def test_after_an_error_nothing_new_begins() -> None:
    begun, ready = [], threading.Barrier(2, timeout=30)
    workers = Workers(2)

    def work(item: int) -> None:
        begun.append(item)
        ready.wait()
        if item == 0:
            raise ValueError("the first")
        for _ in workers.chunks(iter(lambda: time.sleep(0.01) or b"x", None)):  # endless, but for the workers
            pass

    with pytest.raises(ValueError, match="the first"):
        workers.map(work, range(100))
    assert sorted(begun) == [0, 1]
    with pytest.raises(Stopped):
        workers.watched(lambda _count: None)(1)


def test_a_job_that_hangs_holds_nobody_up() -> None:
    forever = threading.Event()

    def work(item: int) -> None:
        if item:
            raise ValueError("gone")
        forever.wait(60)

    start = time.monotonic()
    with pytest.raises(ValueError, match="gone"):
        Workers(2).map(work, [0, 1])
    assert time.monotonic() - start < 30
    forever.set()


SLOW = r"""
import os, signal, sys, time
from hub.remotes import from_url
from hub.store import Store
from hub import cli
from hub.project import named_remotes

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in whose background the tests run has it ignored

class Slow:
    def __init__(self, remote):
        self._remote = remote
    def __getattr__(self, name):
        return getattr(self._remote, name)
    def read(self, manifest, entry, offset):
        data = b"".join(self._remote.read(manifest, entry, offset))
        yield data[:5]
        os.write(2, b"half\n")  # in one piece, beside what the other threads write
        time.sleep(60)

named_remotes.from_url = lambda url: Slow(from_url(url))
sys.argv = ["hub", "pull", "acme/tone", "--from", sys.argv[1]]
cli.main()
"""


def test_ctrl_c_stops_at_once_and_keeps_what_came(store: Store, publish, tmp_path: Path) -> None:
    artifact = publish()
    home = tmp_path / "mine"
    command = [sys.executable, "-c", SLOW, str(store.root)]
    with subprocess.Popen(command, env={**os.environ, "HUB_HOME": str(home)}, stderr=subprocess.PIPE, text=True) as job:
        for _ in artifact.files:
            assert job.stderr.readline() == "half\n"
        start = time.monotonic()
        job.send_signal(signal.SIGINT)
        said = job.stderr.read()
        assert job.wait(30) == 130, said
    assert said.split() == ["aborted"]
    assert time.monotonic() - start < 30  # the servers would have kept it for a minute
    here = Store(home)
    assert (here.list(), here.verify()) == ([], [])
    assert list((home / "tmp").iterdir()) == []
    assert {path.name: path.stat().st_size for path in (home / "partial").iterdir()} == {
        entry.sha256: 5 for entry in artifact.manifest.files
    }
