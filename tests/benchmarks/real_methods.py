"""Every method on real data: accuracy, what trains and is stored, seconds, peak memory, against full fine-tuning.

    python tests/benchmarks/real_methods.py ENCODER DATA_DIR [--tasks sst2,rte] [--methods lora,bitfit] [--rows 4000]

ENCODER is a directory with a BERT-like encoder; DATA_DIR holds `sst2/`, `ag_news/`, ... with JSON lines. Each method
has one learning rate for all data sets, written below; nothing is tuned on the rows that are measured on.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import compose
from train.config import TrainConfig
from train.data import encode, read_rows
from train.evaluate import evaluate
from train.heads import modules_to_save
from train.loop import fit
from train.method import Composite, make_method, methods
from train.seeds import derive, generator

# data set -> (files to train on, the first that is there; files to measure on; columns; tokens a row)
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, str], int]] = {
    "sst2": (("train_sentences.jsonl", "train.jsonl"), ("dev.jsonl",), {}, 64),
    "ag_news": (("train.jsonl",), ("test.jsonl",), {}, 64),
    "cola": (("train.jsonl",), ("dev.jsonl",), {}, 48),
    "rte": (("train.jsonl",), ("dev.jsonl",), {"text": "premise", "text_pair": "hypothesis"}, 128),
    "banking77": (("train.jsonl",), ("test.jsonl",), {}, 48),
}
# A step's size differs by what moves: whole weights, matrices beside them, vectors, inputs.
RATES = {
    "full": 1e-4,
    "dense": 1e-4,
    "partial_freezing": 2e-4,
    "lt_sft": 2e-4,
    "diff_pruning": 2e-4,
    "feature_based": 5e-3,
}
RATES |= {"bitfit": 2e-3, "ia3": 1e-2, "t_few": 1e-2, "prompt": 1e-2, "p_tuning": 2e-3, "prefix": 5e-4, "said": 2e-2}
RATES |= {"krona": 5e-3, "ladder": 2e-3, "lst": 2e-3, "attention_fusion": 1e-2, "head": 5e-3, "sparse": 1e-2}
DEFAULT_RATE = 1e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "houlsby": {"bottleneck_size": 32},
    "mam": {"prefix_length": 16, "bottleneck_size": 16, "scaling": 2.0},  # the paper's for GLUE
    "parallel": {"bottleneck_size": 32, "scaling": 2.0},
    "qlora": {"r": 16},
    "sora": {"r": 16, "sparsity": 1.0},
}
PLAIN_KINDS = ("bias", "bottleneck", "dense", "head", "sparse")  # the same as a method with a better name, or aimless


def resident(field: str, *, reset: bool = False) -> int:
    """VmRSS (now) or VmHWM (the largest since the last reset) of this process (Linux); 0 elsewhere."""
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed must not count for this one
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except (OSError, AttributeError):
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load_task(folder: Path, name: str, tokenizer: Any, rows: int, held: int) -> tuple[Any, Any]:
    """Training and held-out rows: the first `rows` of one shuffle, the same for every seed."""
    train, test, columns, length = TASKS[name]
    config = TrainConfig(task="classification", columns=columns, max_length=length)

    def some(files: tuple[str, ...], count: int) -> list[Any]:
        path = next(folder / name / file for file in files if (folder / name / file).exists())
        found = read_rows(path)
        order = torch.randperm(len(found), generator=generator(0, name, path.name)).tolist()
        return [found[i] for i in order[:count]]

    learned = encode(some(train, rows), config, tokenizer, source=f"{name}/train")
    return learned, encode(some(test, held), config, tokenizer, labels=learned.labels, source=f"{name}/held out")


def one(base: str, method: str, data: tuple[Any, Any], seed: int, given: argparse.Namespace) -> dict[str, float]:
    """One run, from loading the base to the accuracy of its last state."""
    train, held = data
    run = TrainConfig(
        base=base,
        task="classification",
        method=method,
        options=OPTIONS.get(method, {}),
        precision="fp32",
        batch_size=given.batch,
        duration=f"{given.epochs} epochs",
        lr=given.lr or RATES.get(method, DEFAULT_RATE),
        schedule="linear",
        warmup=0.1,
        gradient_checkpointing=False,
        group_by_length=True,
        seed=seed,
    )
    way, run = make_method(run)
    before = resident("VmRSS", reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = compose.load(base, task="classification", labels=train.labels, quantize=run.quantize, dtype="fp32")
    heads = modules_to_save(model, "classification")
    learner = way.build(model, seed=derive(seed, "init"), heads=heads)
    way.warm(model, learner, train)
    trainable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    started = time.perf_counter()
    fit(model, learner, train, None, run, method=way)
    seconds = time.perf_counter() - started
    memory = resident("VmHWM") - before
    stored = way.finish(model, learner)
    members = stored.members.values() if isinstance(stored, Composite) else (stored,)
    head = sum(v.numel() for m in members for v in m.head_state().values())
    total = sum(v.numel() for m in members for v in m.state().values())
    accuracy = evaluate(model, held, batch_size=64)["accuracy"]
    counts = {"trainable": trainable, "stored": total, "head": head}
    return {"accuracy": 100 * accuracy, **counts, "seconds": seconds, "memory": memory}


def main() -> None:
    """Run all, print the table as it grows, then as Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="sst2,ag_news")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--held", type=int, default=2000, help="rows to measure on, at most")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lr", type=float, help="one learning rate for all methods, instead of those in this file")
    parser.add_argument("--json", metavar="FILE", help="also write every run here, as it ends")
    given = parser.parse_args()
    logging.getLogger("train").setLevel(logging.ERROR)
    names = [n for n in methods() if n not in PLAIN_KINDS] if given.methods == "all" else given.methods.split(",")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    tokenizer = compose.tokenizer(given.encoder)
    runs: list[dict[str, Any]] = []
    for task in given.tasks.split(","):
        data = load_task(given.data, task, tokenizer, given.rows, given.held)
        for name in names:
            for seed in seeds:
                found = one(given.encoder, name, data, seed, given)
                runs.append({"task": task, "method": name, "seed": seed, **found})
                print(
                    f"{task} {name} seed {seed}: {found['accuracy']:.1f}% in {found['seconds']:.0f} s", file=sys.stderr
                )
                if given.json:
                    Path(given.json).write_text(json.dumps(runs, indent=1) + "\n")
        print(table([run for run in runs if run["task"] == task], task), flush=True)


def table(runs: list[dict[str, Any]], task: str) -> str:
    """One data set, best method first; counts leave out the task's head, which every method trains."""
    lines = [
        f"### {task}",
        "",
        "| method | accuracy | trained | stored | seconds | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    by = {name: [run for run in runs if run["method"] == name] for name in dict.fromkeys(run["method"] for run in runs)}

    def mean(name: str, key: str) -> float:
        return statistics.mean(run[key] for run in by[name])

    for name in sorted(by, key=lambda n: -mean(n, "accuracy")):
        sd = statistics.stdev([run["accuracy"] for run in by[name]]) if len(by[name]) > 1 else None
        accuracy = f"{mean(name, 'accuracy'):.1f}" + (f" ± {sd:.1f}" if sd is not None else "")
        first = by[name][0]
        counts = " | ".join(f"{first[key] - first['head']:,}" for key in ("trainable", "stored"))
        memory = f"{mean(name, 'memory') / 2**20:.0f} MiB"
        lines.append(f"| {name} | {accuracy} | {counts} | {mean(name, 'seconds'):.0f} | {memory} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
