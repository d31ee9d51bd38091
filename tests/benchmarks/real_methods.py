"""Every method on real data: accuracy, what trains and is stored, seconds, peak memory, against full fine-tuning.

    python tests/benchmarks/real_methods.py ENCODER DATA_DIR --out runs.jsonl [--tasks sst2,rte] [--methods lora,bitfit]
    python tests/benchmarks/real_methods.py ENCODER DATA_DIR --out runs.jsonl --tables [--plot accuracy.svg]

ENCODER is a directory with a BERT-like encoder; DATA_DIR holds `sst2/`, `ag_news/`, ... with JSON lines. Each run is a
line of runs.jsonl, and one that is there is not run again: a killed measurement goes on where it was. The first seed
goes through all methods before the second starts.

Each method has one learning rate for all data sets, and one for the head, written below, but for a head of many
classes. ``--choose --lr`` measures one on rows cut from the training file, so that nothing is chosen on the rows that
are measured on. Models run without dropout and with attention written out, which is what is fastest on a CPU. Seconds
are processor seconds of training.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

import compose
from train.config import TrainConfig
from train.data.datasets import encode, read_rows
from train.learner.heads import head_parameters, modules_to_save
from train.loop import fit
from train.method import Composite, make_method, methods
from train.seeds import derive, generator
from train.steps.evaluate import evaluate

# data set -> (files to train on, the first that is there; file to measure on; columns; tokens a row)
TASKS: dict[str, tuple[tuple[str, ...], str, dict[str, str], int]] = {
    "sst2": (("train_sentences.jsonl", "train.jsonl"), "dev.jsonl", {}, 32),
    "ag_news": (("train.jsonl",), "test.jsonl", {}, 32),
    "cola": (("train.jsonl",), "dev.jsonl", {}, 32),
    "rte": (("train.jsonl",), "dev.jsonl", {"text": "premise", "text_pair": "hypothesis"}, 64),
    "banking77": (("train.jsonl",), "test.jsonl", {}, 32),
}
# A step's size differs by what moves: whole weights, matrices beside them, vectors, inputs.
RATES = {"full": 2e-4, "partial_freezing": 5e-4, "lt_sft": 3e-4, "diff_pruning": 3e-4}
RATES |= {"ia3": 3e-2, "krona": 1e-2, "krona_b": 1e-2, "said": 1e-2, "feature_based": 1e-2}
RATES |= {"prefix": 1e-3, "mam": 1e-3, "rslora": 1e-3}
DEFAULT_RATE = 3e-3
# The head starts from random numbers whatever the method is; where little or nothing below it moves, it bears more.
HEAD_RATE = 1e-3
HEAD_RATES = {"feature_based": 1e-2, "attention_fusion": 1e-2, "prompt": 5e-3, "p_tuning": 5e-3, "ipt": 5e-3}
# 77 classes with 20 rows of each: (times the epochs, rate of the head of every method).
MANY_CLASSES = {"banking77": (2, 5e-3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamix": {"init": "lora"},  # only one of its factors starts small: it has few steps for each copy
    # All linears, and widths that stay under 2% of the encoder's 22.4M numbers.
    "lora": {"r": 8, "target_modules": "all-linear"},
    "rslora": {"r": 8, "target_modules": "all-linear"},
    "dora": {"r": 8, "target_modules": "all-linear"},
    "qlora": {"r": 8},
    "sora": {"r": 8, "target_modules": "all-linear", "sparsity": 1.0},
    "houlsby": {"bottleneck_size": 32},
    "pfeiffer": {"bottleneck_size": 64},
    "mam": {"prefix_length": 16, "bottleneck_size": 16, "scaling": 2.0},  # the paper's for GLUE
    "parallel": {"bottleneck_size": 64, "scaling": 2.0},
    # The head reads what stands first, which is the prompt: it starts as the token that the encoder has there.
    "prompt": {"num_virtual_tokens": 10, "init_text": "[CLS] what is said here , and how ?"},
    "lt_sft": {"second_rate": 10.0},  # 0.5% of the weights take what a LoRA takes, not what all of them take
    "diff_pruning": {"second_rate": 10.0},
}
# The same as a method with a better name, or aimless; without domains, and without answers to choose among, demix and
# t_few are lora and ia3.
LEFT_OUT = ("bias", "bottleneck", "dense", "head", "ladder", "sparse", "demix", "t_few")
IDENTITY = ("task", "method", "seed", "lr", "head_lr", "options")
SETTINGS = ("rows", "held", "epochs", "batch", "precision", "choose")  # of a measurement; equal in all its runs


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


def load_task(given: argparse.Namespace, name: str, tokenizer: Any) -> tuple[Any, Any]:
    """Rows to train and to measure on: the first ones of one shuffle of each file, the same for every seed.

    To choose by, the rows to measure on are the next ones of the training file.
    """
    train, test, columns, length = TASKS[name]
    config = TrainConfig(task="classification", columns=columns, max_length=length)

    def shuffled(path: Path) -> list[Any]:
        found = read_rows(path)
        order = torch.randperm(len(found), generator=generator(0, name, path.name)).tolist()
        return [found[i] for i in order]

    folder = given.data / name
    rows = shuffled(next(folder / file for file in train if (folder / file).exists()))
    learned = encode(rows[: given.rows], config, tokenizer, source=f"{name}/train")
    held = rows[given.rows :] if given.choose else shuffled(folder / test)
    return learned, encode(held[: given.held], config, tokenizer, labels=learned.labels, source=f"{name}/held out")


def one(encoder: str, planned: Mapping[str, Any], data: tuple[Any, Any], tokenizer: Any) -> dict[str, float]:
    """One run, from loading the base to the accuracy of what it stores."""
    train, held = data
    run = TrainConfig(
        base=encoder,
        task="classification",
        method=planned["method"],
        options=planned["options"],
        precision=planned["precision"],
        batch_size=planned["batch"],
        duration=f"{planned['epochs']} epochs",
        lr=planned["lr"],
        head_lr=planned["head_lr"],
        schedule="linear",
        warmup=0.1,
        gradient_checkpointing=False,
        group_by_length=True,
        seed=planned["seed"],
    )
    way, run = make_method(run)
    before = resident("VmRSS", reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = compose.load(encoder, task="classification", labels=train.labels, quantize=run.quantize)
    plain(model)
    heads = modules_to_save(model, "classification")
    started = time.process_time()
    learner = way.build(model, seed=derive(run.seed, "init"), heads=heads, tokenizer=tokenizer)
    way.warm(model, learner, train)
    trainable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    head = sum(p.numel() for p in head_parameters(learner))
    fit(model, learner, train, None, run, method=way)
    seconds = time.process_time() - started
    memory = resident("VmHWM") - before
    stored = way.finish(model, learner)
    members = stored.members.values() if isinstance(stored, Composite) else (stored,)
    total = sum(v.numel() for m in members for v in m.state().values())
    measured = evaluate(model, held, batch_size=64, precision=run.precision)
    scores = {name: 100 * measured[name] for name in ("accuracy", "f1")}
    counts = {"trainable": trainable, "stored": total, "head": head}
    return {**scores, **counts, "seconds": seconds, "memory": memory}


def plain(model: nn.Module) -> None:
    """Attention written out, and no dropout."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def key(run: Mapping[str, Any]) -> str:
    """What makes a run the same as another."""
    return json.dumps({name: run[name] for name in (*IDENTITY, *SETTINGS)}, sort_keys=True)


def settings(given: argparse.Namespace, task: str, method: str) -> dict[str, Any]:
    """How a method is run: this file's rates and options for it, and what the command says."""
    times, head = MANY_CLASSES.get(task, (1, HEAD_RATES.get(method, HEAD_RATE)))
    rates = {"lr": float(given.lr or RATES.get(method, DEFAULT_RATE)), "head_lr": float(given.head_lr or head)}
    said = {field: getattr(given, field) for field in SETTINGS}
    return {**rates, "options": OPTIONS.get(method, {}), **said, "epochs": given.epochs * times}


def is_current(given: argparse.Namespace, run: Mapping[str, Any]) -> bool:
    """Whether a run was made as one would be made now."""
    return all(run[field] == value for field, value in settings(given, run["task"], run["method"]).items())


def measure(given: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every run that is not done, seed by seed."""
    names = [n for n in methods() if n not in LEFT_OUT] if given.methods == "all" else given.methods.split(",")
    tokenizer = compose.tokenizer(given.encoder)
    data: dict[str, tuple[Any, Any]] = {}
    for seed in given.seeds.split(","):
        for task in given.tasks.split(","):
            for name in names:
                run = {"task": task, "method": name, "seed": int(seed), **settings(given, task, name)}
                if key(run) in done:
                    continue
                if task not in data:
                    data[task] = load_task(given, task, tokenizer)
                yield {**run, **one(given.encoder, run, data[task], tokenizer)}


def tables(runs: list[dict[str, Any]]) -> str:
    """A table for each data set that all methods ran on, best first, and one for the others together."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    most = max(len(by_method(runs, task)) for task in tasks)
    whole = [task for task in tasks if len(by_method(runs, task)) > most / 2]
    parts = [f"### {task}\n\n{table(by_method(runs, task))}" for task in whole]
    few = {task: by_method(runs, task) for task in tasks if task not in whole}
    if few:
        names = list(dict.fromkeys(name for found in few.values() for name in found))
        lines = [f"| method | {' | '.join(few)} |", "|---" * (len(few) + 1) + "|"]
        for name in sorted(
            names, key=lambda n: -sum(mean(found[n], "accuracy") for found in few.values() if n in found)
        ):
            cells = (spread(found[name]) if name in found else "" for found in few.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs if run["task"] in few}))
        parts.append(f"### {', '.join(few)}: seeds {seeds}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def table(by: Mapping[str, list[dict[str, Any]]]) -> str:
    """One data set; counts leave out the task's head, which every method trains."""
    columns = ("method", "accuracy", "seeds", "trained", "stored", "rate", "seconds", "peak memory")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in sorted(by, key=lambda n: -mean(by[n], "accuracy")):
        first = by[name][0]
        counts = [f"{first[field] - first['head']:,}" for field in ("trainable", "stored")]
        memory = min(run["memory"] for run in by[name])  # the first run of a process loads libraries as well
        spent = [f"{mean(by[name], 'seconds'):.1f}", f"{memory / 2**20:.0f} MiB"]
        seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in by[name]))
        cells = [name, spread(by[name]), seeds, *counts, f"{first['lr']:g}", *spent]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_method(runs: list[dict[str, Any]], task: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method on a data set."""
    here = [run for run in runs if run["task"] == task]
    return {name: [r for r in here if r["method"] == name] for name in dict.fromkeys(r["method"] for r in here)}


def plot(by: Mapping[str, list[dict[str, Any]]], task: str, path: Path) -> None:
    """Accuracy against trained parameters (log), with the deviation over seeds; the dotted line is full fine-tuning."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "methods", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, runs in by.items():
            x = max(1, runs[0]["trainable"] - runs[0]["head"])  # feature-based trains the head alone
            y, error = mean(runs, "accuracy"), deviation(runs)
            axes.errorbar(x, y, error, fmt="o", color="C3" if name == "full" else "C0", elinewidth=0.8, markersize=4)
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3))
        if "full" in by:
            axes.axhline(mean(by["full"], "accuracy"), color="C3", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="trained parameters, head left out", ylabel="accuracy (%)", title=task)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def mean(runs: list[dict[str, Any]], field: str) -> float:
    """Over seeds."""
    return statistics.mean(run[field] for run in runs)


def deviation(runs: list[dict[str, Any]]) -> float:
    """Standard deviation of the accuracy over seeds; 0 of one."""
    return statistics.stdev(run["accuracy"] for run in runs) if len(runs) > 1 else 0.0


def spread(runs: list[dict[str, Any]]) -> str:
    """Accuracy with its deviation."""
    return f"{mean(runs, 'accuracy'):.1f}" + (f" ± {deviation(runs):.1f}" if len(runs) > 1 else "")


def main() -> None:
    """Run what is missing, or print the tables of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each run")
    parser.add_argument("--tasks", default="sst2,ag_news")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--held", type=int, default=872, help="rows to measure on, at most")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--lr", type=float, help="one learning rate for all methods, instead of those in this file")
    parser.add_argument("--head-lr", type=float, help="the same for the head of all methods")
    parser.add_argument("--choose", action="store_true", help="measure on rows cut from the training file")
    parser.add_argument("--tables", action="store_true", help="run nothing: print the tables of --out as Markdown")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="with --tables: accuracy against trained parameters")
    given = parser.parse_args()
    logging.getLogger("train").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    runs = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if given.tables:
        runs = [run for run in runs if is_current(given, run)]
        print(tables(runs))
        if given.plot:
            first = runs[0]["task"]
            plot(by_method(runs, first), first, given.plot)
        return
    for run in measure(given, {key(run) for run in runs}):
        with given.out.open("a") as stream:
            stream.write(json.dumps(run) + "\n")
        told = f"{run['task']} {run['method']} seed {run['seed']} lr {run['lr']:g}"
        print(f"{told}: {run['accuracy']:.1f}% in {run['seconds']:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
