"""Train, kill -9 at a random moment, resume, and so on until done; compare with the run that nobody disturbed.

A script of its own, so that the forking process has one thread:

    python train_kills.py DIRECTORY --kills 20 --seed 0

Prints one JSON object: the digests of the two artifacts, and how many kills hit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SOURCE_DATE_EPOCH"] = "1700000000"  # else a manifest says when it was packed

from hub.store import Store
from train.config import TrainConfig
from train.pipeline import run
from train.steps.checkpoint import CHECKPOINT


def child(config: TrainConfig, place: Path, *, resume: bool) -> int:
    """Train in a fork; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    sys.stderr = (place.parent / f"{place.name}.log").open("a")
    run(config, folder=place / "run", ref="me/notes@1.0.0", store=Store(place / "store"), resume=resume, save_every=2)
    os._exit(0)


def disturbed(config: TrainConfig, place: Path, kills: int, seconds: float, dice: random.Random) -> int:
    """Start, kill and resume until `kills` have hit, then let it end; returns how many did."""
    hits = 0
    while True:
        saved = (place / "run" / CHECKPOINT).exists()
        if not saved:
            shutil.rmtree(place / "run", ignore_errors=True)
        pid = child(config, place, resume=saved)
        if hits < kills:
            time.sleep(dice.uniform(0.1, seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            hits += 1
        elif status:
            sys.exit(f"a run ended with {status}: " + (place.parent / f"{place.name}.log").read_text()[-2000:])
        else:
            return hits


def main() -> None:
    """Both runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    notes = given.directory / "notes.txt"
    notes.write_text("".join(f"Note {i}: the adapter of site {i % 7} is loaded, then active.\n" for i in range(60)))
    data = {"train": str(notes), "eval": 0.2}
    values = {"max_length": 32, "batch_size": 4, "eval_every": 3, "schedule": "cosine"}
    config = TrainConfig(data=data, duration=8 + 4 * given.kills, options={"r": 2, "lora_dropout": 0.1}, **values)
    # What is imported here, no fork has to. No tensor is touched: torch's thread pool does not survive a fork.
    import_module("transformers.models.llama.modeling_llama")
    import_module("compose.api")
    started = time.perf_counter()
    assert os.waitpid(child(config, given.directory / "whole", resume=False), 0)[1] == 0
    seconds = time.perf_counter() - started
    dice = random.Random(given.seed)
    hits = disturbed(config, given.directory / "killed", given.kills, max(0.8, 3 * seconds / given.kills), dice)
    found = {p: Store(given.directory / p / "store").get("me/notes@1.0.0").digest for p in ("whole", "killed")}
    sys.stdout.write(json.dumps({**found, "hits": hits, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
