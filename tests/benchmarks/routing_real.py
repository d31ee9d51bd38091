"""Routing on a real instruct model, through the commands: eight tasks with heads, and domains by length of the prompt.

    python tests/benchmarks/routing_real.py BASE DATA_DIR --home DIR [--parts tasks,domains] [--json FILE|-]

BASE is a decoder's directory, DATA_DIR holds the tasks of `real_tasks.TASKS` and ``lm_domains``. Adapters are trained
by `hub train` into a store in ``--home`` once: another run measures only, and keeps the answers of `hub run`.

tasks     one LoRA and head for each task; `hub route fit` for each method, `hub run` over mixed rows that do not name
          their task, `hub serve` asked for the first of them. An answer counts if it names the row's class.
          oracle: the row's own adapter. base: a head alone, trained on the same rows on the bare base. majority: the
          class that the task's training rows have most. found: how often the row's own adapter was chosen.
domains   one LoRA for each known domain; `hub route eval --prompt-tokens`: perplexity of what follows a prompt of so
          many tokens, as `hub run` and `hub serve` answer, for domains with an adapter and for others without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from bench_tools import machine
from real_tasks import TASKS

from hub.cli import main as command

KNOWN = "bible_kjv,code_python,legal_terms_of_service,medical_pubmed"
NOVEL = "political_speeches,web_overheard"
Row = dict[str, str]


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--home", type=Path, required=True, help="a directory for the store and the files in between")
    parser.add_argument("--parts", default="tasks,domains")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--train", type=int, default=240, help="training rows of each task")
    parser.add_argument("--test", type=int, default=30, help="test rows of each task")
    parser.add_argument("--fit", type=int, default=32, help="rows of each task that routers are fitted on")
    parser.add_argument("--eval", type=int, default=4, help="rows of each task that hub route eval reads")
    parser.add_argument("--epochs", type=float, default=2.0, help="of each task's training")
    parser.add_argument("--methods", default="discriminant", help="routers over the tasks")
    parser.add_argument("--served", type=int, default=8, help="rows that hub serve is asked for")
    parser.add_argument("--known", default=KNOWN, help="domains with an adapter")
    parser.add_argument("--novel", default=NOVEL, help="domains without one")
    parser.add_argument("--steps", type=int, default=30, help="steps of 4 x 128 tokens for each domain")
    parser.add_argument("--rows", type=int, default=3, help="test texts of each domain")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each test text")
    parser.add_argument("--prompts", default="4,16,64", help="tokens of the prompts")
    parser.add_argument("--domain-methods", default="likelihood,discriminant,arrow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    options.home.mkdir(parents=True, exist_ok=True)
    os.environ["HUB_HOME"] = str((options.home / "store").resolve())
    parts = {"tasks": Tasks, "domains": Domains}
    started = time.process_time()
    found: dict[str, Any] = {"machine": machine()}
    for name in options.parts.split(","):
        found[name] = parts[name](options).measure()
    found["cpu_seconds"] = time.process_time() - started
    if options.json:
        text = json.dumps(found, indent=2) + "\n"
        sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")


def hub(*words: object) -> None:
    """A command; SystemExit where it fails."""
    try:
        command([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"hub {' '.join(map(str, words))}: exit {end.code}") from None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table of Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def published(ref: str) -> bool:
    """Whether the store has it."""
    from hub.errors import NotFound
    from hub.store import Store

    try:
        Store().get(ref)
    except NotFound:
        return False
    return True


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Tasks:
    """Classification: an adapter with a head for each task, and rows that do not say which they are of."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.names = options, options.tasks.split(",")
        self.place = options.home / f"tasks-{options.seed}"
        self.train: dict[str, list[Row]] = {}
        self.test: dict[str, list[Row]] = {}
        for name in self.names:
            self._read(name)

    def measure(self) -> dict[str, Any]:
        """Accuracies by task, routed, told and without adapters."""
        for name in self.names:
            self._trained(name, "lora", f"tasks/{name}")
            self._trained(name, "feature_based", f"heads/{name}")
        rows = [{"text": r["text"], "of": n, "class": r["label"]} for n in self.names for r in self.test[n]]
        random.Random(self.options.seed).shuffle(rows)
        asked = [{**row, "own": f"tasks/{row['of']}", "head": f"heads/{row['of']}"} for row in rows]
        mixed = write(self.place / "mixed.jsonl", asked)
        ways = {"oracle": self._run(mixed, "oracle", "--adapter-column", "own")}
        ways["base"] = self._run(mixed, "base", "--adapter-column", "head")
        for method in self.options.methods.split(","):
            router = f"routers/{method}-{self.options.seed}"
            if not published(router):
                data = [word for n in self.names for word in ("--data", f"{n}={self.place / f'{n}.jsonl'}")]
                members = [f"{n}=tasks/{n}" for n in self.names]
                size = ("--max-length", 48, "--max-rows", self.options.fit)
                hub("route", "fit", *members, "--method", method, *data, *size, "-o", f"{router}@1.0.0")
            ways[method] = self._run(mixed, method, "--router", router, "--route-weights")
        found: dict[str, Any] = {"rows": self._count(ways)}
        first = self.options.methods.split(",")[0]
        served = self._served(f"routers/{first}-{self.options.seed}", asked)
        same = sum(one["output"] == label for one, label in zip(ways[first], served, strict=False))
        print(f"hub serve: {same} of {len(served)} answers as hub run's", flush=True)
        evaluated = self._evaluated(f"routers/{first}-{self.options.seed}")
        print(f"hub route eval, {self.options.eval} rows of each task: {json.dumps(evaluated)}", flush=True)
        return {**found, "served": [same, len(served)], "evaluated": evaluated}

    def _evaluated(self, router: str) -> dict[str, float]:
        """`hub route eval`: the mean accuracy of each way."""
        report = self.place / "eval.json"
        sets = [word for n in self.names for word in ("--data", f"{n}={self.place / f'{n}.test.jsonl'}")]
        size = ("--max-length", 48, "--max-rows", self.options.eval)
        hub("route", "eval", router, *sets, *size, "--json", report)
        found = json.loads(report.read_text("utf-8"))["rows"]
        return {way: mean(row[way] for row in found) for way in ("best single", "average", "routed", "oracle")}

    def _count(self, ways: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        rows = []
        for name in self.names:
            common = Counter(row["label"] for row in self.train[name]).most_common(1)[0][0]
            row: dict[str, Any] = {"task": name, "majority": mean(r["label"] == common for r in self.test[name])}
            for way, answers in ways.items():
                own = [answer for answer in answers if answer["of"] == name]
                row[way] = mean(answer["output"] == answer["class"] for answer in own)
                if "output_weights" in own[0]:
                    best = [max(a["output_weights"], key=a["output_weights"].get) for a in own]
                    row[f"found, {way}"] = mean(ref.split("@")[0] == f"tasks/{name}" for ref in best)
            rows.append(row)
        columns = [key for key in rows[0] if key != "task"]
        rows.append({"task": "mean", **{key: mean(row[key] for row in rows) for key in columns}})
        shown = [{k: v if k == "task" else f"{100 * v:.1f}" for k, v in row.items()} for row in rows]
        print(table(shown), flush=True)
        return rows

    def _run(self, mixed: Path, way: str, *how: str) -> list[dict[str, Any]]:
        """`hub run` over the mixed rows."""
        out = self.place / f"{way}.out.jsonl"
        if out.exists() and [row["text"] for row in read(out)] == [row["text"] for row in read(mixed)]:
            return read(out)
        hub("run", mixed, "--base", self.options.base, *how, "--out", out, "--overwrite", "--dtype", "bf16")
        return read(out)

    def _served(self, router: str, rows: Sequence[Row]) -> list[str]:
        """Labels that `hub serve` gives the first rows."""
        texts = [row["text"] for row in rows[: self.options.served]]
        with serving(self.options.base) as address:
            body = json.dumps({"model": router, "input": texts}).encode()
            request = urllib.request.Request(f"{address}/v1/classify", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=600) as answer:
                return [one["label"] for one in json.load(answer)["data"]]

    def _trained(self, name: str, method: str, ref: str) -> None:
        """Train an adapter for a task, unless it is there."""
        ref = f"{ref}@0.0.{self.options.seed + 1}"
        if published(ref):
            return
        tuned = ["options.r=8", "options.target_modules=all-linear"] if method == "lora" else []
        hub(
            "train",
            f"base={self.options.base}",
            f"method={method}",
            *tuned,
            "task=classification",
            f"data.train={self.place / f'{name}.jsonl'}",
            "max_length=48",
            f"duration={self.options.epochs:g} epochs",
            "lr=1e-3",
            "head_lr=5e-3",
            "precision=bf16",
            f"seed={self.options.seed}",
            *("--name", ref, "--out", self.place / "runs" / f"{name}-{method}", "--save-every", 0),
        )

    def _read(self, name: str) -> None:
        train_file, test_file = TASKS[name]
        draw = random.Random(f"{self.options.seed} {name}")
        rows = self._rows(train_file)
        draw.shuffle(rows)
        count = self.options.train
        rest = rows[count:] if test_file is None else self._rows(test_file)
        if test_file is not None:
            draw.shuffle(rest)
        classes = {row["label"] for row in rows[:count]}
        self.train[name] = rows[:count]
        self.test[name] = [row for row in rest if row["label"] in classes][: self.options.test]
        write(self.place / f"{name}.jsonl", self.train[name])
        write(self.place / f"{name}.test.jsonl", self.test[name])

    def _rows(self, file: str) -> list[Row]:
        """Rows with a label; the texts of a pair one a line."""
        rows = []
        for fields in read(self.options.data / file):
            if fields.get("label") is not None:
                texts = [v for k, v in fields.items() if k not in ("label", "idx") and isinstance(v, str)]
                rows.append({"text": "\n".join(texts), "label": str(fields["label"])})
        return rows


@contextmanager
def serving(base: Path) -> Iterator[str]:
    """`hub serve` in a process of its own; gives its address."""
    words = [sys.executable, "-m", "hub", "serve", str(base), "--port", "0", "--dtype", "bf16"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


class Domains:
    """Language: an adapter for each known domain, and texts of these and of others."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.known, self.novel = options.known.split(","), options.novel.split(",")
        self.place = options.home / f"domains-{options.seed}"

    def measure(self) -> dict[str, Any]:
        """Perplexities of each method by length of the prompt."""
        for name in self.known:
            self._trained(name)
        return {"rows": [row for method in self.options.domain_methods.split(",") for row in self._measured(method)]}

    def _measured(self, method: str) -> list[dict[str, Any]]:
        name, _, option = method.partition("+")  # such as likelihood+hedge=true
        router = f"routers/domains-{name}{'-' + option.split('=')[0] if option else ''}-{self.options.seed}"
        if not published(router):
            data = [word for n in self.known for word in ("--data", f"{n}={self._file(n, 'train')}")]
            more = ["--option", option] if option else []
            members = [f"{n}=domains/{n}" for n in self.known]
            size = ("--max-rows", 64, "--max-length", 128)
            hub("route", "fit", *members, "--method", name, *data, *more, *size, "-o", f"{router}@1.0.0")
        report = self.place / f"{method}.json"
        sets = [word for n in (*self.known, *self.novel) for word in ("--data", f"{n}={self._file(n, 'test')}")]
        size = ("--max-rows", self.options.rows, "--max-length", self.options.tokens)
        lengths = [w for n in self.options.prompts.split(",") for w in ("--prompt-tokens", n)]
        hub("route", "eval", router, *sets, *size, *lengths, "--json", report)
        rows = json.loads(report.read_text("utf-8"))["rows"]
        found = []
        for length in map(int, self.options.prompts.split(",")):
            for group, domains in (("known", self.known), ("novel", self.novel)):
                own = [row for row in rows if row["set"] in domains and row["prompt_tokens"] == length]
                ways = {k: math.exp(mean(math.log(r[k]) for r in own)) for k, v in own[0].items() if _figure(k, v)}
                found.append({"method": method, "prompt": length, "domains": group, **ways})
        shown = [{k: f"{v:.1f}" if isinstance(v, float) else v for k, v in row.items()} for row in found]
        print(table(shown), flush=True)
        return found

    def _trained(self, name: str) -> None:
        ref = f"domains/{name}@0.0.{self.options.seed + 1}"
        if published(ref):
            return
        hub(
            "train",
            f"base={self.options.base}",
            "method=lora",
            "options.r=8",
            "options.target_modules=all-linear",
            "task=causal_lm",
            f"data.train={self._file(name, 'train')}",
            "max_length=128",
            "batch_size=4",
            f"duration={self.options.steps} steps",
            "lr=1e-3",
            "precision=bf16",
            f"seed={self.options.seed}",
            *("--name", ref, "--out", self.place / "runs" / name, "--save-every", 0),
        )

    def _file(self, name: str, split: str) -> Path:
        return Path(self.options.data / "lm_domains" / name / f"{split}.jsonl")


def _figure(key: str, value: object) -> bool:
    return isinstance(value, float) and key != "prompt_tokens"


if __name__ == "__main__":
    main()
