"""Rows that a router chooses for, beside rows that name their adapter."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import compose
from hub.cli import main
from router.artifact import load
from router.bench import Batch
from router.engine.engine import Engine
from router.engine.request import Request

BASE = "builtin:tiny-lm"
ROWS = ["The parties to this agreement", "def run(self):", "import json", "The court shall"]


@pytest.fixture(scope="module")
def routed(published, routers):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=3)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", ["near", "likely", "arrow"])
def test_a_routed_row_is_what_the_router_makes_the_model_say(routed, published, name):
    asked = [Request(text=text, adapter=f"local/{name}", max_new_tokens=5, weights=True) for text in ROWS]
    answers = routed.run([*asked, Request(text="To be", adapter="law", max_new_tokens=2)])
    stored, model = load(f"local/{name}", published.store), published.model(None)
    stored.attach(model)
    for text, answer in zip(ROWS, answers, strict=False):
        ids = torch.tensor(routed.host.tokenizer(text).input_ids)
        batch = Batch.of([ids])
        with stored.router.routed(model, batch):
            made = model.generate(ids[None], attention_mask=batch.attention_mask, max_new_tokens=5, do_sample=False)
        assert answer.text == routed.host.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        wanted = stored.router.weights(model, batch)[0].tolist()
        told = [answer.weights.get(f"local/{m}@1.0.0", 0.0) for m in stored.router.experts]
        assert told == pytest.approx(wanted, abs=1e-4)
    compose.activate(model, None)
    for member in stored.artifacts:
        compose.detach(model, member)


def test_a_router_knows_its_texts(routed):
    answers = routed.run([Request(text=text, adapter="local/near", max_new_tokens=1) for text in ROWS])
    best = [max(a.weights, key=a.weights.__getitem__) for a in answers]
    assert best == [f"local/{name}@1.0.0" for name in ("law", "code", "code", "law")]


def test_rows_are_classified_by_the_head_of_the_task_that_was_chosen(routed):
    answers = routed.run([Request(text=text, adapter="local/tasks", scores=3) for text in ROWS])
    for text, answer in zip(ROWS, answers, strict=True):
        best = max(answer.weights, key=answer.weights.__getitem__)
        assert len(answer.scores) == (2 if "mood" in best else 3)
        if answer.weights[best] == 1.0:
            alone = routed.run([Request(text=text, adapter=best, scores=3)])[0]
            assert (alone.label, alone.scores) == (answer.label, pytest.approx(answer.scores))


def test_run_tells_the_weights(published, routed, jsonl, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))
    path = jsonl([{"text": text} for text in ROWS])
    command = ["run", str(path), "--router", "local/near", "--route-weights", "--max-new-tokens", "3"]
    found = CliRunner().invoke(main, command)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.exit_code == 0, found.output
    assert all(sum(row["output_weights"].values()) == pytest.approx(1, abs=1e-3) for row in rows)
    assert list(rows[0]["output_weights"]) == ["local/law@1.0.0"] or rows[0]["output_weights"]["local/law@1.0.0"] > 0.5
