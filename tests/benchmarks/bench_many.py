"""Many adapters over one base: N together (`train.many`) against N runs one after the other, in time and memory.

    python tests/benchmarks/bench_many.py [--adapters 8] [--rows 4] [--json FILE|-]

Each adapter has its own data and `rows` rows a step. Time: processor seconds of all rows of a step in one pass against
those of N passes. Memory: the largest resident size while N train with the rows of *one* run in a pass, against one run
by itself, the base included, above the process before the base was loaded (Linux).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_tools import llama, machine, resident, shape_options

import compose
from train.config import TrainConfig
from train.data.batches import Dataset, Ragged
from train.loop import fit
from train.many import Job, fit_many


def data(seed: int, given: argparse.Namespace) -> Dataset:
    """Random rows of one length."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, given.vocabulary, (given.rows * given.steps, given.prompt), generator=random)
    return Dataset({"input_ids": Ragged.of(ids.tolist())}, "causal_lm", pad_id=0)


def jobs(model: Any, given: argparse.Namespace, count: int) -> list[Job]:
    """Fresh adapters, one seed each."""
    run = TrainConfig(batch_size=given.rows, duration=given.steps, schedule="constant", warmup=0, lr=1e-3)
    options = {"r": given.rank, "target_modules": given.targets}
    made = [compose.create(model, "lora", options, name=f"a{i}", seed=i) for i in range(count)]
    return [Job(adapter, data(i, given), run) for i, adapter in enumerate(made)]


def peak(base: Any, given: argparse.Namespace, count: int) -> int:
    """Bytes above the process without a model, at most, while `count` adapters train with one run's rows in a pass."""
    model = copy.deepcopy(base)
    held = sum(p.numel() * p.element_size() for p in base.parameters())
    made = jobs(model, given, count)
    resident("VmHWM", reset=True)
    before = resident("VmRSS")
    fit_many(model, made, rows=given.rows)
    own = sum(p.numel() * p.element_size() for job in made for p in job.adapter.parameters())
    return held + own + resident("VmHWM") - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {
        "adapters": 8,
        "rows": 2,
        "prompt": 16,
        "width": 512,
        "layers": 8,
        "vocabulary": 2000,
        "rank": 8,
        "steps": 3,
    }
    shape_options(parser, **shape, rounds=2)
    parser.add_argument("--targets", default="all-linear", help="where the LoRAs act")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    base = llama(given)
    times: dict[str, list[float]] = {"together": [], "apart": []}
    for turn in range(given.rounds + 1):
        together, apart = copy.deepcopy(base), copy.deepcopy(base)
        many, single = jobs(together, given, given.adapters), jobs(apart, given, given.adapters)
        started = time.process_time()
        results = fit_many(together, many)
        middle = time.process_time()
        alone = {}
        for job in single:
            compose.activate(apart, job.adapter.name)
            alone[job.adapter.name] = fit(apart, job.adapter, job.train, None, job.config)
        if turn:
            times["together"].append(middle - started)
            times["apart"].append(time.process_time() - middle)
    gap = max(
        abs(a["loss"] - b["loss"]) for n in alone for a, b in zip(results[n].history, alone[n].history, strict=True)
    )
    del together, apart, many, single
    memory = {name: peak(base, given, count) for name, count in (("one", 1), ("many", given.adapters))}
    report = {
        "adapters": given.adapters,
        "seconds": {name: min(values) for name, values in times.items()},
        "time_ratio": min(times["together"]) / min(times["apart"]),
        "memory": memory,
        "memory_ratio": memory["many"] / memory["one"],
        "largest_loss_difference": gap,
        "machine": machine(),
    }
    if given.json:
        text = json.dumps(report, indent=2)
        sys.stdout.write(text + "\n") if given.json == "-" else Path(given.json).write_text(text)
    print(
        f"{given.adapters} adapters at once: {report['time_ratio']:.2f}x the time of {given.adapters} runs, "
        f"{report['memory_ratio']:.2f}x the memory of one; losses within {gap:.1e}\n{report['machine']}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
