"""Push and pull of one large adapter, side by side with ``cp`` and ``sha256sum`` of the same bytes.

    python tests/benchmarks/bench_hub_transfer.py [--megabytes 200] [--rounds 8] [--json FILE|-]

Each transfer copies every byte and checks every byte, so the peer of each is one ``cp`` and one ``sha256sum``.
Prints the medians, and the median of the ratio, round by round.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file

from hub.manifest import Draft
from hub.pack import pack
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def once(place: Path, source: Store, weights: Path, turn: int) -> dict[str, float]:
    """Time each candidate, the first one another one each time.

    Each begins with as much free memory as the others: what it has written is removed before the next one writes.
    (Pages that the machine has not used lately are slow to get, in a virtual machine above all.)
    """
    there = from_url(str(place.parent / "there"))

    def copy() -> None:
        subprocess.run(["cp", str(weights), str(place / "copy")], check=True)

    def copy_and_check() -> None:
        copy()
        subprocess.run(["sha256sum", str(place / "copy")], check=True, stdout=subprocess.DEVNULL)

    candidates: dict[str, Callable[[], object]] = {
        "cp": copy,
        "cp + sha256sum": copy_and_check,
        "push": lambda: push(source, from_url(str(place / "remote")), "big"),
        "pull": lambda: pull(Store(place / "store"), there, "big"),
    }
    found = {}
    names = list(candidates)
    for name in names[turn % 4 :] + names[: turn % 4]:
        place.mkdir()
        found[name] = seconds(candidates[name])
        shutil.rmtree(place)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        artifact = Path(directory) / "artifact"
        artifact.mkdir()
        random = np.random.default_rng(0)
        width = options.megabytes * 10**6 // (20 * 1024 * 4)
        tensors = {
            f"layers.{i}.lora_{f}.weight": random.random((1024, width), np.float32) for i in range(10) for f in "AB"
        }
        save_file(tensors, artifact / "adapter_model.safetensors", metadata={"format": "pt"})
        (artifact / "adapter_config.json").write_text("{}")
        pack(artifact, Draft(name="big", version="1.0", kind="lora"))
        store = Store(Path(directory) / "source")
        store.put(artifact)
        push(store, from_url(str(Path(directory) / "there")), "big")
        weights, place = artifact / "adapter_model.safetensors", Path(directory) / "round"
        rounds = [once(place, store, weights, turn) for turn in range(options.rounds + 1)][1:]
    peer = [found["cp + sha256sum"] for found in rounds]
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "megabytes": options.megabytes,
        **{name: median(found[name] for found in rounds) for name in rounds[0]},
        "push / (cp + sha256sum)": median(found["push"] / p for found, p in zip(rounds, peer, strict=True)),
        "pull / (cp + sha256sum)": median(found["pull"] / p for found, p in zip(rounds, peer, strict=True)),
    }
    for name, value in report.items():
        print(f"{name:<26} {value if isinstance(value, str) else round(value, 3)}", file=sys.stderr)
    if options.json is not None:
        text = json.dumps(report, indent=2)
        print(text) if str(options.json) == "-" else options.json.write_text(text)


if __name__ == "__main__":
    main()
