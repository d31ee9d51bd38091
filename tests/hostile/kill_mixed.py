"""Eight processes on one store, each publishing, pulling, moving aliases, yanking, deleting or collecting; kill -9.

A script of its own, as `kill_rounds` is, whose tools it uses:

    python kill_mixed.py DIRECTORY --kills 500 --workers 8 --seed 0

After every round, in which all processes were killed at random moments: both stores verify, no line of either log is
lost, every lock is free, and an undisturbed run of every job completes. Prints one JSON object.
"""

import argparse
import json
import os
import random
import shutil
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from kill_rounds import CHUNK, artifact, check, child, killed

import hub.remotes.directory
import hub.storage.staging
from hub.errors import Conflict, NotFound
from hub.project.gc import collect, plan
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push

BLOCK = 6  # rounds on one set of stores
COUNT = 6  # artifacts


def publish(place: Path, sources: list[Path], number: int) -> None:
    store = Store(place / "store")
    store.put(sources[number])
    push(store, from_url(str(place / "remote")), f"acme/tone@1.{number}")


def fetch(place: Path, sources: list[Path], number: int) -> None:
    pull(Store(place / "store"), from_url(str(place / "origin")), f"acme/tone@1.{number}")


def move(place: Path, sources: list[Path], number: int) -> None:
    store = Store(place / "store")
    for alias in ("prod", "best"):
        store.tag(f"acme/tone@1.{number % 2}", alias)
    store.untag("acme/tone", "best")


def yank(place: Path, sources: list[Path], number: int) -> None:
    for reason in ("bad", None):
        Store(place / "store").yank(f"acme/tone@1.{number % 2}", reason)


def waste(place: Path, sources: list[Path], number: int) -> None:
    """Publish, delete and collect: the bytes are those of other artifacts, which may be on their way just now."""
    store = Store(place / "store")
    junk = place / f"junk-{os.getpid()}-{number}"
    artifact(junk, number, name="acme/junk", version=f"1.{os.getpid()}.{time.monotonic_ns()}")
    store.delete(store.put(junk).ref, "waste")
    gather(place, sources, number)


def gather(place: Path, sources: list[Path], number: int) -> None:
    store = Store(place / "store")
    collect(store, plan(store, superseded=number % 2 == 0, grace=0), grace=0)


JOBS = (publish, fetch, move, yank, waste, gather)


def work(job, place: Path, sources: list[Path], number: int) -> None:
    with suppress(NotFound, Conflict):  # another process was faster: it evicted, deleted or moved what this one wanted
        job(place, sources, number)


def lines(place: Path) -> list[bytes]:
    """Whole lines of the log."""
    data = (place / "log.jsonl").read_bytes() if (place / "log.jsonl").exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def begin(place: Path, sources: list[Path]) -> None:
    store, origin = Store(place / "store"), Store(place / "origin")
    for source in sources:
        origin.put(source)
    for source in sources[:2]:
        store.put(source)
        push(store, from_url(str(place / "remote")), store.list()[-1].ref)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    hub.remotes.directory.CHUNK = hub.storage.staging.CHUNK = CHUNK
    moments = random.Random(options.seed)
    sources = [artifact(options.directory / "sources" / str(number), number) for number in range(COUNT)]
    begin(options.directory / "warm", sources)  # every module is imported before the first fork
    for job in JOBS:
        work(job, options.directory / "warm", sources, 0)
    kills, rounds, jobs, span = 0, 0, Counter[str](), 0.2
    while kills < options.kills:
        place = options.directory / f"block-{rounds // BLOCK}"
        if rounds % BLOCK == 0:
            shutil.rmtree(options.directory / f"block-{rounds // BLOCK - 1}", ignore_errors=True)
            begin(place, sources)
        before = {name: lines(place / name) for name in ("store", "remote")}
        chosen = [(moments.choice(JOBS), moments.randrange(COUNT)) for _ in range(options.workers)]
        pids = [child(work, job, place, sources, number) for job, number in chosen]
        died, _ = killed(pids, [moments.uniform(0, 0.6 * span) for _ in pids])
        kills, rounds = kills + died, rounds + 1
        jobs.update(job.__name__ for job, _ in chosen)
        check(place, rounds)
        for name, known in before.items():
            if lines(place / name)[: len(known)] != known:
                raise SystemExit(f"round {rounds}: the log of {name} has lost a line")
        start = time.monotonic()
        for job in JOBS:
            _, status = os.waitpid(child(work, job, place, sources, rounds % COUNT), 0)
            if status:
                raise SystemExit(f"round {rounds}: the next {job.__name__} did not complete")
        span = 0.8 * span + 0.2 * (time.monotonic() - start)
        check(place, rounds)
        left = [path.name for path in (place / "store" / "tmp").glob("*") if not path.name.startswith(".")]
        if left:
            raise SystemExit(f"round {rounds}: rooms of the dead are left: {left}")
    print(json.dumps({"kills": kills, "rounds": rounds, "jobs": dict(jobs), "seconds_undisturbed": round(span, 3)}))


if __name__ == "__main__":
    main()
