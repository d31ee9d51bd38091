"""Fork children that push or pull, kill them (-9) at random moments, and look at what is left.

A script of its own, so that the forking process is small and has no threads:

    python kill_rounds.py push|pull DIRECTORY --kills 100 --workers 1 --seed 0

After every kill each store must verify without a problem, and the next undisturbed run must complete. Prints one
JSON object with the number of kills and of operations that ended before their kill came.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import hub.remotes.directory
import hub.storage.staging
from hub.manifest import Draft
from hub.pack import pack
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push

BLOCK = 5  # rounds on one set of stores, before it is made anew
CHUNK = 2**13  # bytes: an artifact travels in many pieces, so that kills fall between them


def artifact(directory: Path, number: int, *, name: str = "acme/tone", version: str | None = None) -> Path:
    directory.mkdir(parents=True)
    values = np.random.default_rng(number).normal(size=(2, 2**14)).astype(np.float32)
    save_file({"q.lora_A.weight": values[:1], "q.lora_B.weight": values[1:]}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"r": 1}')
    (directory / "README.md").write_text(f"# {number}\n")
    pack(directory, Draft(name=name, version=version or f"1.{number}", kind="lora"))
    return directory


def push_once(place: Path, source: Path, number: int) -> None:
    store = Store(place / "store")
    store.put(source)
    store.tag(f"acme/tone@1.{number}", "prod")
    push(store, from_url(str(place / "remote")), "acme/tone@prod")


def pull_once(place: Path, source: Path, number: int) -> None:
    pull(Store(place / "store"), from_url(str(place / "remote")), f"acme/tone@1.{number}")


def child(job, *arguments) -> int:
    """Run a job in a fork; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        job(*arguments)
    except BaseException as error:  # the child of a fork must never return into the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def killed(pids: list[int], delays: list[float]) -> tuple[int, int]:
    """Kill each child after its delay; returns how many died of it, and how many had ended before."""
    start, died, ended = time.monotonic(), 0, 0
    for delay, pid in sorted(zip(delays, pids, strict=True)):
        time.sleep(max(start + delay - time.monotonic(), 0))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        died += os.WIFSIGNALED(status)
        ended += not os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            raise SystemExit("a disturbed job failed by itself")
    return died, ended


def check(place: Path, number: int) -> None:
    """What must hold at every moment."""
    for name in ("store", "remote"):
        problems = Store(place / name).verify()
        if problems:
            raise SystemExit(f"after a kill in round {number}, {name}: {'; '.join(map(str, problems))}")


def undisturbed(job, *arguments) -> float:
    """Seconds that the job takes when nobody kills it."""
    start = time.monotonic()
    _, status = os.waitpid(child(job, *arguments), 0)
    if status:
        raise SystemExit("the next run did not complete")
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["push", "pull"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    hub.remotes.directory.CHUNK = hub.storage.staging.CHUNK = CHUNK
    job = push_once if options.job == "push" else pull_once
    moments = random.Random(options.seed)
    sources = [artifact(options.directory / "sources" / str(number), number) for number in range(BLOCK)]
    warm = options.directory / "warm"
    push_once(warm, sources[0], 0)  # every module is imported before the first fork
    span, kills, ended, rounds = undisturbed(push_once, options.directory / "timing", sources[0], 0), 0, 0, 0
    while kills < options.kills:
        place, number = options.directory / f"block-{rounds // BLOCK}", rounds % BLOCK
        if number == 0:
            shutil.rmtree(options.directory / f"block-{rounds // BLOCK - 1}", ignore_errors=True)
            if options.job == "pull":
                for i, source in enumerate(sources):
                    push_once(place / "origin", source, i)
                (place / "origin" / "remote").rename(place / "remote")
        pids = [child(job, place, sources[number], number) for _ in range(options.workers)]
        done = killed(pids, [moments.uniform(0, 1.1 * span) for _ in pids])
        kills, ended, rounds = kills + done[0], ended + done[1], rounds + 1
        check(place, rounds)
        span = 0.8 * span + 0.2 * undisturbed(job, place, sources[number], number)
        if Store(place / ("remote" if options.job == "push" else "store")).verify(f"acme/tone@1.{number}"):
            raise SystemExit("the next run brought other bytes")
        found = Store(place / "store").get(f"acme/tone@1.{number}")
        if found.file("README.md").read_text() != f"# {number}\n":
            raise SystemExit("the next run brought other bytes")
        for name in ("store", "remote"):
            left = [path.name for path in (place / name / "tmp").glob("*") if not path.name.startswith(".")]
            if left and name == ("remote" if options.job == "push" else "store"):
                raise SystemExit(f"{name} keeps rooms of the dead: {left}")
    print(json.dumps({"kills": kills, "ended_before": ended, "rounds": rounds, "seconds_undisturbed": round(span, 4)}))


if __name__ == "__main__":
    main()
