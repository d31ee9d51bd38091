"""The measurements of routing run on small data and report what they promise. No figure is checked for being good."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORDS = (
    "the",
    "a",
    "film",
    "plot",
    "is",
    "was",
    "good",
    "bad",
    "fine",
    "dull",
    "he",
    "they",
    "eats",
    "eat",
    "well",
    ".",
)


@pytest.fixture
def measure(monkeypatch, capsys):
    """Run a measurement as a script and return its JSON report."""

    def run(name, *options):
        monkeypatch.syspath_prepend(HERE)
        monkeypatch.setattr(sys, "argv", [name, *map(str, options), "--json=-"])
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out)

    return run


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_domains(measure, tmp_path):
    said = {
        "law": "the parties agree to this licence",
        "code": "def add(a, b): return a + b",
        "new": "dear sir or madam",
    }
    for name, text in said.items():
        for split in ("train", "valid", "test"):
            lines(
                tmp_path / "data" / name / f"{split}.jsonl", [{"text": f"{text}, {split} {i}. " * 6} for i in range(3)]
            )
    shape = ("--novel=new", "--steps=1", "--rank=2", "--texts=2", "--dev=2", "--tokens=32")
    found = measure("real_domains", tmp_path / "data", *shape, "--keep", tmp_path / "kept")
    assert [row["domain"] for row in found["rows"]] == ["code", "law", "new", "mean, known", "mean, novel"]
    assert found["worst_regret"] < 1e-6 and found["worst_hedge"] <= math.log(5)
    ways = ("base", "dense", "average", "uniform", "demix", "hedged", "cached", "fitted", "oracle")
    assert all(row[way] > 1 for row in found["rows"] for way in ways)
    again = measure("real_domains", tmp_path / "data", *shape, "--keep", tmp_path / "kept")
    assert again["rows"] == found["rows"], "what was kept is mixed again, without a model"


def test_tasks(measure, tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(tmp_path / "encoder")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    films = [{"text": f"the {w} is {g} .", "label": g in ("good", "fine")} for w in WORDS[2:4] for g in WORDS[6:10]]
    verbs = [
        {"text": f"{s} {v} well", "label": (s == "he") == (v == "eats")} for s in WORDS[10:12] for v in WORDS[12:14]
    ]
    for file, rows in (("train_sentences", films), ("test", films)):
        lines(tmp_path / "data" / "sst2" / f"{file}.jsonl", rows)
    for file in ("train", "dev"):
        lines(tmp_path / "data" / "cola" / f"{file}.jsonl", 2 * verbs)
    options = (
        tmp_path / "encoder",
        tmp_path / "data",
        "--train=8",
        "--test=8",
        "--epochs=1",
        "--keep",
        tmp_path / "kept",
    )
    found = measure("real_tasks", *options, "--seeds=0,1")
    assert [row["task"] for row in found["rows"]] == ["sst2", "cola", "mean"]
    assert found["rows"][-1]["found"] == "100.0 ± 0.0", "films and grammar are told apart by their words"
    assert all(sum(row.values()) == 8 for table in found["confusion"] for row in table.values())
    assert found["rows"][0]["routed"] == found["rows"][0]["oracle"]
    again = measure("real_tasks", *options, "--seeds=0,1")
    assert again["rows"] == found["rows"] and again["cpu_seconds"] == found["cpu_seconds"]
    with pytest.raises(SystemExit, match="another directory"):
        measure("real_tasks", *options, "--seeds=0", "--lr=0.1")


def test_engine(measure):
    shape = ("--rows=2", "--prompt=6", "--tokens=4", "--arriving=3", "--rank=2", "--every=0.001")
    found = measure("bench_engine", "--adapters=0,2", "--ways=ours,transformers,peft", *shape)
    ways = {(row["adapters"], row["load"], row["way"]) for row in found["rows"]}
    assert len(ways) == len(found["rows"]) == 2 * 2 * 3
    assert all(row["cpu_s"] > 0 and row["tokens"] > 3 for row in found["rows"])


def test_traffic(measure):
    shape = ("--asked=2", "--long=40", "--rows=6", "--read=20", "--write=6", "--clients=2", "--minutes=0.05")
    found = {row["what"]: row["value"] for row in measure("bench_traffic", *shape)["rows"]}
    assert 0 < found["cache MiB, the most"] <= found["cache MiB, formula"]
    assert found["tokens written"] > 0 and found["resident MiB, last fifth"] > 1
    assert all(found[f"beside {other}, p95 ms"] > 0 for other in ("an ensemble", "a token router", "long prompts"))
