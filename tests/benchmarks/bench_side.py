"""What ladder side-tuning saves: peak memory of a training step against LoRA, on an encoder and on a causal model.

    python tests/benchmarks/bench_side.py [--width 512] [--layers 8] [--rows 8] [--prompt 128] [--json FILE|-]

The same random base, rows and optimizer, in float32. Memory is the largest resident size above the process before the
base was made (Linux): of everything, and of what training adds to the base. The ladder starts from fresh values: to
choose what to copy into it, it holds once, before the first step, a gradient of each weight of the blocks.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_tools import llama, machine, resident, shape_options
from transformers import BertConfig, BertForSequenceClassification

from train.config import TrainConfig
from train.data.batches import Dataset, Ragged
from train.loop import fit
from train.method import make_method

METHODS: dict[str, dict[str, Any]] = {"lora": {"r": 8, "target_modules": "all-linear"}, "lst": {"fisher_rows": 0}}


def bert(given: argparse.Namespace) -> BertForSequenceClassification:
    """A random encoder of the options' shape with a classifier on it."""
    config = BertConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.width,
        intermediate_size=4 * given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.width // 64),
        max_position_embeddings=8 * given.prompt,
    )
    return BertForSequenceClassification(config).eval().requires_grad_(False)


def data(task: str, given: argparse.Namespace) -> Dataset:
    """Random rows of one length."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, given.vocabulary, (given.rows * given.steps, given.prompt), generator=random)
    columns: dict[str, Any] = {"input_ids": Ragged.of(ids.tolist())}
    if task == "classification":
        columns["labels"] = ids[:, 0] % 2
    return Dataset(columns, task, pad_id=0, labels=("a", "b") if task == "classification" else ())


def peak(base: Any, task: str, name: str, given: argparse.Namespace) -> tuple[int, int]:
    """Bytes at most while a method trains: with the base, and above it."""
    model = copy.deepcopy(base)
    config = TrainConfig(method=name, options=METHODS[name], task=task, batch_size=given.rows, duration=given.steps)
    method, config = make_method(config)
    heads = ("classifier",) if task == "classification" else ()
    rows = data(task, given)
    learner = method.build(model, heads=heads)
    method.warm(model, learner, rows)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier run left free would hide what this one takes
    resident("VmHWM", reset=True)
    before = resident("VmRSS")
    fit(model, learner, rows, None, config, method=method)
    added = resident("VmHWM") - before + sum(p.numel() * p.element_size() for p in learner.parameters())
    return sum(p.numel() * p.element_size() for p in base.parameters()) + added, added


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"rows": 8, "prompt": 128, "width": 512, "layers": 8, "vocabulary": 2000, "rank": 8, "steps": 2}
    shape_options(parser, **shape, rounds=1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.threads:
        torch.set_num_threads(given.threads)
    report: dict[str, Any] = {"machine": machine()}
    for kind, base, task in (
        ("encoder", bert(given), "classification"),
        ("causal", llama(given), "causal_lm"),
    ):
        found = {name: peak(base, task, name, given) for name in METHODS}
        ratios = [lst / lora for lst, lora in zip(found["lst"], found["lora"], strict=True)]
        report[kind] = {"memory": found, "ratio": ratios[0], "added_ratio": ratios[1]}
        told = f"{kind}: LST {ratios[0]:.2f}x the memory of LoRA with the base, {ratios[1]:.2f}x without it"
        print(told, file=sys.stderr, flush=True)
    print(report["machine"], file=sys.stderr)
    if given.json:
        text = json.dumps(report, indent=2) + "\n"
        sys.stdout.write(text) if given.json == "-" else Path(given.json).write_text(text)


if __name__ == "__main__":
    main()
