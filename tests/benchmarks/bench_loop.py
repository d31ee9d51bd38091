"""What the training loop costs besides the model: `fit` and transformers' Trainer against a bare torch loop.

    python tests/benchmarks/bench_loop.py [--steps N] [--rounds N] [--json FILE|-]

All three train the same LoRA on the built-in base with the same batches, in turn, in one process. Times are CPU
seconds a step (other work on the machine does not count), the least of the rounds; ratios are to the bare loop.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

import compose
from train.config import TrainConfig
from train.data.batches import Dataset, Ragged
from train.loop import fit
from train.steps.objective import next_token

LR = 1e-3


def fresh() -> tuple[Any, Any]:
    model = compose.load("builtin:tiny-lm", dtype="fp32")
    adapter = compose.create(model, "lora", {"r": 16, "target_modules": "all-linear"}, name="a", seed=1)
    compose.activate(model, "a")
    return model, adapter


def bare(ids: torch.Tensor, rows: int) -> float:
    """The loop one writes by hand: forward, backward, clip, AdamW."""
    model, adapter = fresh()
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=LR, weight_decay=0.0, fused=True)
    started = time.process_time()
    for batch in ids.split(rows):
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
        loss = next_token(logits, batch) / (batch.numel() - len(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.process_time() - started


def ours(ids: torch.Tensor, rows: int) -> float:
    model, adapter = fresh()
    data = Dataset({"input_ids": Ragged.of(ids.tolist())}, "causal_lm")
    config = TrainConfig(duration=len(ids) // rows, batch_size=rows, lr=LR, schedule="constant", warmup=0.0)
    started = time.process_time()
    fit(model, adapter, data, None, config)
    return time.process_time() - started


def trainer(ids: torch.Tensor, rows: int) -> float:
    model, _ = fresh()
    items = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=rows,
            max_steps=len(ids) // rows,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            log_level="error",
        )
        peer = Trainer(model, arguments, train_dataset=items)
        peer.remove_callback(PrinterCallback)
        started = time.process_time()
        peer.train()
        return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the rows; - is stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for rows, length in ((2, 32), (8, 64), (16, 256)):
        steps = max(3, options.steps * 64 // (rows * length)) if rows * length > 1024 else options.steps
        ids = torch.randint(2, 4096, (steps * rows, length), generator=torch.Generator().manual_seed(0))
        ways = {"bare": bare, "ours": ours, "trainer": trainer}
        times = [{name: way(ids, rows) / steps for name, way in ways.items()} for _ in range(options.rounds)]
        best = {name: min(round_[name] for round_ in times) for name in ways}
        ratios = {f"{name} / bare": round(best[name] / best["bare"], 3) for name in ("ours", "trainer")}
        found.append({"rows": rows, "tokens": length, **{n: round(v, 5) for n, v in best.items()}, **ratios})
        if options.json != "-":
            print(found[-1])
    report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "results": found}
    if options.json == "-":
        print(json.dumps(report, indent=2))
    elif options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
