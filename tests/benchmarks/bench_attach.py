"""Many adapters onto one base, beside PEFT: reading them from disk, the memory they take, and changing the active one.

    python tests/benchmarks/bench_attach.py [--count 100] [--width 768 --layers 12] [--json FILE|-]

The same PEFT directories, LoRA of rank ``--rank`` on all linear layers, are read by ``compose.attach`` and by PEFT's
``load_adapter``, each side in a process of its own.

load_s, load_cpu_s
    Seconds, and processor seconds, until all are attached, without the first (which imports and wraps).
memory
    What the process has grown by (RSS) meanwhile, divided by the bytes of the adapters' tensors.
first_ms, swap_ms
    Making an attached adapter active, for the first time and when it was active before: the median. ``set_adapter``
    in PEFT, whose every call is alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from bench_tools import llama, machine, report, shape_options
from peft import PeftModel

import compose


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="how many adapters")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "PLACE"), help=argparse.SUPPRESS)
    shape_options(parser, prompt=64, layers=6, width=384, vocabulary=4096, rank=8, rounds=21)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.one:
        side, place = options.one
        print(json.dumps(SIDES[side](options, Path(place))))
        return
    with tempfile.TemporaryDirectory() as place:
        size = write(options, Path(place))
        rows = [in_a_process(side, place, argv if argv is not None else sys.argv[1:]) for side in SIDES]
    for row in rows:
        row["memory"] = row.pop("grown") / (size * options.count)
    found = {"machine": machine(), "model": vars(options), "adapter_bytes": size, "rows": rows}
    columns = ("side", "load_s", "load_cpu_s", "memory", "first_ms", "swap_ms")
    report(found, columns, options.json, sys.stdout)


def write(options: argparse.Namespace, place: Path) -> int:
    """Make the adapters' directories and return the bytes of one."""
    base = llama(options)
    maker = compose.create(base, "lora", {"r": options.rank, "target_modules": "all-linear"}, name="maker")
    for i in range(options.count + 1):
        with torch.no_grad():
            for parameter in maker.parameters():
                parameter.normal_(std=0.02)
        compose.save(maker, place / f"a{i}", model=base)
    return sum(p.numel() * p.element_size() for p in maker.parameters())


def in_a_process(side: str, place: str, argv: list[str]) -> dict[str, Any]:
    """Measure one side in a fresh process."""
    command = [sys.executable, __file__, *argv, "--one", side, place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"side": side, **found}


def ours(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """compose.attach and compose.activate."""
    model = llama(options)
    compose.attach(model, f"a{options.count}", place / f"a{options.count}")
    found = load(options, lambda name: compose.attach(model, name, place / name))
    return found | swap(options, lambda name: compose.activate(model, name))


def peft(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """load_adapter and set_adapter."""
    last = f"a{options.count}"
    model = PeftModel.from_pretrained(llama(options), place / last, adapter_name=last)
    found = load(options, lambda name: model.load_adapter(place / name, name))
    return found | swap(options, model.set_adapter)


SIDES = {"ours": ours, "peft": peft}


def load(options: argparse.Namespace, attach: Callable[[str], Any]) -> dict[str, Any]:
    """Attach all adapters but the last, which is there."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(options.count):
            attach(f"a{i}")
    took = {"load_s": time.perf_counter() - start[0], "load_cpu_s": time.process_time() - start[1]}
    gc.collect()
    return {**took, "grown": psutil.Process().memory_info().rss - before}


def swap(options: argparse.Namespace, activate: Callable[[str], Any]) -> dict[str, float]:
    """Make adapters active in turn, two of them again and again, and the others once."""
    first, again = [], []
    for i in range(options.rounds):
        for times, name in ((first, f"a{min(i + 2, options.count - 1)}"), (again, f"a{i % 2}")):
            start = time.perf_counter()
            activate(name)
            times.append(time.perf_counter() - start)
    return {"first_ms": median(first) * 1e3, "swap_ms": median(again[2:] or again) * 1e3}


if __name__ == "__main__":
    main()
