"""Many tasks at once without their names: one encoder, a LoRA and a head for each task, rows mixed and shuffled.

    python tests/benchmarks/real_tasks.py ENCODER_DIR DATA_DIR [--train 256] [--test 200] [--seeds 0,1,2]

ENCODER_DIR is a sentence encoder of the BERT family. The tasks are those of `TASKS` in DATA_DIR: sentiment, topic,
intents, acceptability, entailment and questions. Every way is measured on the same mixed rows, and an answer counts if
it names the row's class:

oracle    each row is answered by its own task's adapter and head
routed    the adapter is chosen for each row by `centroid` with the pooled covariance, top 1, on the bare encoder
nearest   the same with c-BTM's plain distance
multi     one adapter of four times the rank and one head over the classes of all tasks, trained on all rows
told      the same, told the task: only that task's classes are allowed

Accuracy in percent, mean over tasks and seeds with the deviation over seeds. ``found`` is how often the row's own task
was chosen.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from bench_tools import machine, report
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import compose
from router.bench import Batch, Bench
from router.dispatch import row_expressions
from router.gating import Gating
from router.router import Router

WAYS = ("oracle", "routed", "nearest", "multi", "told", "found", "found_nearest")
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
    parser.add_argument("--train", type=int, default=256, help="training rows of each task")
    parser.add_argument("--test", type=int, default=200, help="test rows of each task")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    started, seeds = time.process_time(), [int(seed) for seed in options.seeds.split(",")]
    runs = [Study(options, seed).run() for seed in seeds]
    names = list(runs[0])
    rows = [{"task": name, **summary([run[name] for run in runs])} for name in names]
    means = [{way: mean(run[name][way] for name in names) for way in WAYS} for run in runs]
    rows.append({"task": "mean", **summary(means)})
    model = {**vars(options), "encoder": options.encoder.name, "data": options.data.name}
    found = {"machine": machine(), "model": model, "cpu_seconds": time.process_time() - started, "rows": rows}
    report(found, ("task", *WAYS), options.json, sys.stdout)


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


class Study:
    """One seed."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.tokenizer = AutoTokenizer.from_pretrained(options.encoder)
        self.model = compose.load(AutoModel.from_pretrained(options.encoder, add_pooling_layer=False))
        self.tasks = {name: self._read(name) for name, files in TASKS.items() if (options.data / files[0]).exists()}
        self.tasks["multi"] = union(list(self.tasks.values()))
        self.heads: dict[str, nn.Linear] = {}

    def run(self) -> dict[str, dict[str, float]]:
        """Accuracy of each way on each task."""
        torch.manual_seed(self.seed)
        for name, task in self.tasks.items():
            rank = self.options.rank * (4 if name == "multi" else 1)
            self.heads[name] = self._train(task, rank)
            print(f"seed {self.seed}: {name}", file=sys.stderr, flush=True)
        self.single = {name: task for name, task in self.tasks.items() if name != "multi"}
        bench = Bench(self.model, {n: n for n in self.single}, {n: t.train for n, t in self.single.items()})
        compose.activate(self.model, None)
        routers = {
            way: Router.fit("centroid", bench, options={"distance": distance}, gating=Gating(top_k=1))
            for way, distance in (("routed", "mahalanobis"), ("nearest", "euclidean"))
        }
        found = self._measure(routers)
        print(f"seed {self.seed}: {json.dumps(found)}", file=sys.stderr, flush=True)
        return found

    def _measure(self, routers: dict[str, Router]) -> dict[str, dict[str, float]]:
        names = list(self.single)
        rows = [(n, i) for n, task in self.single.items() for i in range(len(task.test))]
        random.Random(self.seed).shuffle(rows)
        right = {name: dict.fromkeys(WAYS, 0) for name in names}
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            owners = [name for name, _ in part]
            batch = Batch.of([self.tasks[n].test[i] for n, i in part], tasks=owners)
            labels = [int(self.tasks[n].test_labels[i]) for n, i in part]
            chosen = {way: router.weights(self.model, batch).argmax(1) for way, router in routers.items()}
            picks = {way: [names[k] for k in found.tolist()] for way, found in chosen.items()}
            multi = ["multi"] * len(part)
            answers = {
                "oracle": self._answers(batch, owners, owners),
                "routed": self._answers(batch, picks["routed"], picks["routed"]),
                "nearest": self._answers(batch, picks["nearest"], picks["nearest"]),
                "multi": self._answers(batch, multi, multi),
                "told": self._answers(batch, multi, owners),
            }
            for row, (owner, label) in enumerate(zip(owners, labels, strict=True)):
                for way, said in answers.items():
                    right[owner][way] += said[row] == self.tasks[owner].classes[label]
                right[owner]["found"] += picks["routed"][row] == owner
                right[owner]["found_nearest"] += picks["nearest"][row] == owner
        return {name: {way: right[name][way] / len(self.tasks[name].test) for way in WAYS} for name in names}

    @torch.no_grad()
    def _answers(self, batch: Batch, adapters: list[str], tasks: list[str]) -> list[str]:
        """Class that each row's adapter says, of those of a task: all rows in one forward pass."""
        places = {name: k for k, name in enumerate(dict.fromkeys(adapters))}
        one_hot = F.one_hot(torch.tensor([places[name] for name in adapters]), len(places)).float()
        compose.activate(self.model, row_expressions(list(places), one_hot))
        vectors = self._embed(batch)
        compose.activate(self.model, None)
        said = []
        for vector, adapter, task in zip(vectors, adapters, tasks, strict=True):
            scores = dict(zip(self.tasks[adapter].classes, self.heads[adapter](vector).tolist(), strict=True))
            said.append(max(self.tasks[task].classes, key=scores.__getitem__))
        return said

    def _embed(self, batch: Batch) -> Tensor:
        states = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)  # (B, d)

    def _train(self, task: Task, rank: int) -> nn.Linear:
        """An adapter called as the task, resident; returns its head."""
        wanted = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        adapter = compose.create(self.model, "lora", wanted, name=task.name, seed=self.seed)
        compose.activate(self.model, task.name)
        head = nn.Linear(int(self.model.config.hidden_size), len(task.classes))
        tuned = [
            {"params": [p for p in adapter.parameters() if p.requires_grad], "lr": 2e-3},
            {"params": list(head.parameters()), "lr": 1e-2},
        ]
        optimizer = torch.optim.AdamW(tuned, weight_decay=0.01)
        batches = list(self._epochs(task))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in tuned], total_steps=len(batches), pct_start=0.1
        )
        for batch in batches:
            loss = F.cross_entropy(head(self._embed(batch)), batch.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in tuned for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
        adapter.freeze()
        compose.activate(self.model, None)
        return head.requires_grad_(False)

    def _epochs(self, task: Task) -> Iterator[Batch]:
        draw = random.Random(self.seed)
        for _ in range(self.options.epochs):
            order = list(range(len(task.train)))
            draw.shuffle(order)
            for start in range(0, len(order), 16):
                picked = order[start : start + 16]
                yield Batch.of([task.train[i] for i in picked], labels=task.train_labels[torch.tensor(picked)])

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
