"""Many tasks at once without their names: one encoder, a LoRA and a head for each task, rows mixed and shuffled.

    python tests/benchmarks/real_tasks.py ENCODER_DIR DATA_DIR [--train 400] [--test 200] [--seeds 0,1,2] [--keep DIR]

ENCODER_DIR is a sentence encoder of the BERT family. The tasks are those of `TASKS` in DATA_DIR: sentiment, topic,
intents, acceptability, entailment and questions. Every way is measured on the same mixed rows, and an answer counts if
it names the row's class:

oracle    each row is answered by its own task's adapter and head
routed    the adapter is chosen for each row by `discriminant`, on the bare encoder
nearest   the same by `centroid`, c-BTM's distance in the last layer
multi     one adapter of four times the rank and one head over the classes of all tasks, trained on all rows
told      the same, told the task: only that task's classes are allowed

Routers are fitted on the training rows of each task. Accuracy in percent, mean over tasks and seeds with the deviation
over seeds. ``found`` is how often the row's own task was chosen. With ``--keep`` a seed that was measured is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from bench_tools import machine, report
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import compose
from router.bench import Batch, Bench
from router.dispatch import row_expressions
from router.router import Router

WAYS = ("oracle", "routed", "nearest", "multi", "told", "found", "found_nearest")
ROUTERS = {"routed": "discriminant", "nearest": "centroid"}
# name: (training file, test file or None: cut from the training rows)
TASKS = {
    "sst2": ("sst2/train_sentences.jsonl", "sst2/test.jsonl"),
    "books": ("multidomain_sentiment/books/train.jsonl", "multidomain_sentiment/books/test.jsonl"),
    "ag_news": ("ag_news/train.jsonl", "ag_news/test.jsonl"),
    "banking77": ("banking77/train.jsonl", "banking77/test.jsonl"),
    "cola": ("cola/train.jsonl", "cola/dev.jsonl"),
    "rte": ("rte/train.jsonl", "rte/dev.jsonl"),
    "snli": ("snli/train_from_dev.jsonl", "snli/test_from_dev.jsonl"),
    "boolq": ("superglue/BoolQ/val.jsonl", None),
}
LENGTH = 48
Row = tuple[str, int]  # a task and the number of one of its test rows


@dataclass(frozen=True)
class Task:
    """Encoded rows of a task; labels are numbers."""

    name: str
    classes: tuple[str, ...]
    train: list[Tensor]
    train_labels: Tensor
    test: list[Tensor]
    test_labels: Tensor


def main(argv: list[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=400, help="training rows of each task")
    parser.add_argument("--test", type=int, default=200, help="test rows of each task")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, help="adapt only so many layers, the last ones [all]")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the adapters; of the heads five times that")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", type=Path, help="a directory where each seed's figures are kept")
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    runs = [measured(options, int(seed)) for seed in options.seeds.split(",")]
    tables = [run["accuracy"] for run in runs]
    names = list(tables[0])
    rows = [{"task": name, **summary([table[name] for table in tables])} for name in names]
    means = [{way: mean(table[name][way] for name in names) for way in WAYS} for table in tables]
    rows.append({"task": "mean", **summary(means)})
    found = {
        "machine": machine(),
        "model": setting(options),
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        "rows": rows,
        "confusion": [run["confusion"] for run in runs],
    }
    report(found, ("task", *WAYS), options.json, sys.stdout)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What a measurement depends on, but for its seed."""
    left_out = ("seeds", "keep", "json")
    return {key: getattr(value, "name", value) for key, value in vars(options).items() if key not in left_out}


def measured(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Figures of a seed, from where they are kept or made now."""
    kept = options.keep and options.keep / f"{seed}.json"
    if kept and kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if found["setting"] != setting(options):
            raise SystemExit(f"{kept} was measured with {found['setting']}: give another directory")
        return found
    started = time.process_time()
    found = {**Study(options, seed).run(), "setting": setting(options), "cpu_seconds": time.process_time() - started}
    print(f"seed {seed}: {json.dumps(found['accuracy'])}", file=sys.stderr, flush=True)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def summary(figures: Sequence[dict[str, float]]) -> dict[str, str]:
    """Mean and deviation over seeds, in percent."""
    found = {}
    for way in WAYS:
        values = [100 * run[way] for run in figures]
        found[way] = f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
    return found


def union(tasks: Sequence[Task]) -> Task:
    """All rows of all tasks, over the classes of all of them; classes of one name are one."""
    classes = tuple(sorted({label for task in tasks for label in task.classes}))
    labels = [classes.index(task.classes[int(i)]) for task in tasks for i in task.train_labels]
    return Task(
        "multi", classes, [row for task in tasks for row in task.train], torch.tensor(labels), [], torch.empty(0)
    )


def batch_of(rows: Sequence[Tensor], labels: Tensor | None = None) -> Batch:
    """Rows padded to a multiple of 16 tokens: of few widths, so that kernels made for a shape are used again."""
    batch = Batch.of(rows, labels=labels)
    more = (0, -batch.input_ids.shape[1] % 16)
    return replace(batch, input_ids=F.pad(batch.input_ids, more), attention_mask=F.pad(batch.attention_mask, more))


class Study:
    """One seed."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.tokenizer = AutoTokenizer.from_pretrained(options.encoder)
        plain = {"add_pooling_layer": False, "attn_implementation": "eager"}  # fused attention is slower on short rows
        self.model = compose.load(AutoModel.from_pretrained(options.encoder, **plain))
        self.single = {name: self._read(name) for name, files in TASKS.items() if (options.data / files[0]).exists()}
        self.tasks = {**self.single, "multi": union(list(self.single.values()))}
        self.heads: dict[str, nn.Linear] = {}

    def run(self) -> dict[str, Any]:
        """Train everything; accuracy of each way on each task, and which tasks rows were taken for."""
        # No cache of cast weights: it lives as long as this block, and would hide every step of the optimizer.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            for name, task in self.tasks.items():
                torch.manual_seed(self.seed)
                self.heads[name] = self._train(task, self.options.rank * (4 if name == "multi" else 1))
                print(f"seed {self.seed}: {name} at {time.process_time():.0f} s", file=sys.stderr, flush=True)
            compose.activate(self.model, None)
            bench = Bench(self.model, {n: n for n in self.single}, {n: t.train for n, t in self.single.items()})
            routers = {way: Router.fit(method, bench) for way, method in ROUTERS.items()}
            rows = [(name, i) for name, task in self.single.items() for i in range(len(task.test))]
            random.Random(self.seed).shuffle(rows)
            picks = {way: self._picks(router, rows) for way, router in routers.items()}
            asked = {(row, "multi") for row in rows} | {(row, row[0]) for row in rows}
            said = self._answers(sorted(asked | {(row, pick[row]) for pick in picks.values() for row in rows}))
        return self._count(rows, picks, said)

    def _count(
        self, rows: list[Row], picks: Mapping[str, dict[Row, str]], said: Mapping[tuple[Row, str], dict[str, float]]
    ) -> dict[str, Any]:
        right = {name: dict.fromkeys(WAYS, 0.0) for name in self.single}
        confusion = {name: dict.fromkeys(self.single, 0) for name in self.single}
        for row in rows:
            owner, i = row
            task = self.single[owner]
            label, share = task.classes[int(task.test_labels[i])], 1 / len(task.test)
            answers = {way: said[row, picks[way][row]] for way in ROUTERS}
            answers |= {"oracle": said[row, owner], "multi": said[row, "multi"]}
            answers["told"] = {name: score for name, score in said[row, "multi"].items() if name in task.classes}
            for way, scores in answers.items():
                right[owner][way] += share * (max(scores, key=scores.__getitem__) == label)
            right[owner]["found"] += share * (picks["routed"][row] == owner)
            right[owner]["found_nearest"] += share * (picks["nearest"][row] == owner)
            confusion[owner][picks["routed"][row]] += 1
        return {"accuracy": right, "confusion": confusion}

    def _picks(self, router: Router, rows: Sequence[Row]) -> dict[Row, str]:
        """The adapter that weighs most for each row."""
        names, found = list(router.experts), {}
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            best = router.weights(self.model, self._batch(part)).argmax(1)
            found |= {row: names[k] for row, k in zip(part, best.tolist(), strict=True)}
        return found

    @torch.no_grad()
    def _answers(self, asked: Sequence[tuple[Row, str]]) -> dict[tuple[Row, str], dict[str, float]]:
        """What each adapter's head says of the classes of its task, for each row it is asked about."""
        found = {}
        for start in range(0, len(asked), 32):
            part = asked[start : start + 32]
            places = {name: k for k, name in enumerate(dict.fromkeys(adapter for _, adapter in part))}
            one_hot = F.one_hot(torch.tensor([places[adapter] for _, adapter in part]), len(places)).float()
            compose.activate(self.model, row_expressions(list(places), one_hot))
            for key, vector in zip(part, self._embed(self._batch([row for row, _ in part])), strict=True):
                scores = self.heads[key[1]](vector).float().tolist()
                found[key] = dict(zip(self.tasks[key[1]].classes, scores, strict=True))
        compose.activate(self.model, None)
        return found

    def _batch(self, rows: Sequence[Row]) -> Batch:
        return batch_of([self.single[name].test[i] for name, i in rows])

    def _embed(self, batch: Batch) -> Tensor:
        states = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
        mask = batch.attention_mask[..., None].float()
        return (states * mask).sum(1) / mask.sum(1)  # (B, d)

    def _train(self, task: Task, rank: int) -> nn.Linear:
        """An adapter called as the task, resident; returns its head."""
        depth, last = int(self.model.config.num_hidden_layers), self.options.layers
        layers = None if last is None else list(range(depth - last, depth))
        wanted = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "layers": layers}
        adapter = compose.create(self.model, "lora", wanted, name=task.name, seed=self.seed)
        compose.activate(self.model, task.name)
        head = nn.Linear(int(self.model.config.hidden_size), len(task.classes))
        tuned = [
            {"params": [p for p in adapter.parameters() if p.requires_grad], "lr": self.options.lr},
            {"params": list(head.parameters()), "lr": 5 * self.options.lr},
        ]
        optimizer = torch.optim.AdamW(tuned, weight_decay=0.01)
        batches = list(self._epochs(task))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in tuned], total_steps=len(batches), pct_start=0.1
        )
        for batch in batches:
            loss = F.cross_entropy(head(self._embed(batch)).float(), batch.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in tuned for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
        adapter.freeze()
        compose.activate(self.model, None)
        return head.requires_grad_(False)

    def _epochs(self, task: Task) -> Iterator[Batch]:
        """Batches of 16 rows, shuffled anew in each epoch."""
        draw = random.Random(self.seed)
        for _ in range(self.options.epochs):
            order = list(range(len(task.train)))
            draw.shuffle(order)
            for start in range(0, len(order), 16):
                picked = order[start : start + 16]
                yield batch_of([task.train[i] for i in picked], task.train_labels[torch.tensor(picked)])

    def _read(self, name: str) -> Task:
        train_file, test_file = TASKS[name]
        found = self._rows(train_file)
        draw = random.Random(f"{self.seed} {name}")
        draw.shuffle(found)
        rest = found[self.options.train :] if test_file is None else self._rows(test_file)
        if test_file is not None:
            draw.shuffle(rest)
        train, test = found[: self.options.train], rest[: self.options.test]
        classes = tuple(sorted({label for _, label in train}))
        test = [row for row in test if row[1] in classes]
        place = {label: i for i, label in enumerate(classes)}
        return Task(
            name,
            classes,
            [self._ids(text) for text, _ in train],
            torch.tensor([place[label] for _, label in train]),
            [self._ids(text) for text, _ in test],
            torch.tensor([place[label] for _, label in test]),
        )

    def _rows(self, file: str) -> list[tuple[tuple[str, ...], str]]:
        rows = []
        for line in (self.options.data / file).read_text("utf-8").splitlines():
            fields = json.loads(line)
            label = fields.get("label")
            if label is not None:
                texts = tuple(str(v) for k, v in fields.items() if k not in ("label", "idx") and isinstance(v, str))
                rows.append((texts, str(label)))
        return rows

    def _ids(self, texts: tuple[str, ...]) -> Tensor:
        pair = texts[:2] if len(texts) > 1 else texts
        return torch.tensor(self.tokenizer(*pair, truncation=True, max_length=LENGTH).input_ids)


if __name__ == "__main__":
    main()
