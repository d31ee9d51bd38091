"""`hub route eval` measures what the engine answers with: weights from the prompt, loss on the rest."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner

import compose
import router
from hub.cli import main
from hub.errors import UsageError
from router.dispatch import row_expressions
from router.engine.engine import Engine
from router.engine.request import Request
from router.scorer import SCORERS

BASE = "builtin:tiny-lm"
TEXTS = {
    "law": ["The parties agree that the licence shall terminate on breach of any clause of this agreement."] * 3,
    "code": ["def add(a, b):\n    return a + b  # the sum of both numbers\n\nprint(add(1, 2))"] * 3,
}
TEXT = "The court held that the party in breach shall pay the costs of the other party and of the appeal."


@pytest.fixture
def store(published, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))
    return published.store


def nats(router_, model, tokenizer, ids, weights):
    """Loss of a text's tokens, each under the row's own expression, (T-1,)."""
    expressions = row_expressions(list(router_.experts.values()), weights)
    compose.activate(model, expressions)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    return -logits.gather(-1, ids[1:, None])[:, 0]


@pytest.mark.parametrize(("method", "options"), [("likelihood", {}), ("likelihood", {"hedge": True}), ("centroid", {})])
def test_the_loss_is_of_what_follows_with_the_weights_that_the_engine_gives_the_prompt(store, method, options):
    name = f"local/f{method}{len(options)}"
    router.fit(["law", "code"], method, f"{name}@1.0.0", data=TEXTS, options=options)
    report = router.evaluate(name, {"new": [router.Text(TEXT)]}, prompts=(3, 9), base=BASE)
    stored, tokenizer = router.load(name), compose.tokenizer(BASE)
    model = compose.load(BASE)
    stored.attach(model)
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    engine = Engine(BASE, store=store, dtype="fp32")
    assert [row["prompt_tokens"] for row in report.rows] == [3, 9]
    for row in report.rows:
        n = row["prompt_tokens"]
        asked = Request(ids=tuple(ids[:n].tolist()), adapter=name, max_new_tokens=1)
        given = engine.run([asked])[0].weights
        weights = [given.get(str(artifact.ref), 0.0) for artifact in stored.artifacts.values()]
        loss = nats(stored.router, model, tokenizer, ids, torch.tensor([weights]))[n - 1 :]
        assert row["items"] == len(loss)
        assert math.log(row["routed"]) == pytest.approx(float(loss.mean()), rel=1e-2)  # bfloat16
        assert ("demix" in row) == (method == "likelihood")
    engine.close()


def test_a_mixture_is_measured_as_the_ensemble_answers(store):
    """`demix` of one text is what `router.Ensemble` says of its rest."""
    router.fit(["law", "code"], "likelihood", "local/mixed@1.0.0")
    (row,) = router.evaluate("local/mixed", {"new": [router.Text(TEXT)]}, prompts=(5,)).rows
    model = compose.load(BASE, adapters={name: f"local/{name}" for name in ("law", "code")})
    ids = torch.tensor([compose.tokenizer(BASE)(TEXT).input_ids])
    score = router.Ensemble(model, ["law", "code"]).score(ids)
    assert math.log(row["demix"]) == pytest.approx(-float(score.log_probs[0, 4:].mean()), rel=1e-4)


def test_short_texts_are_halved_and_lengths_are_told(store, tmp_path):
    router.fit(["law", "code"], "arrow", "local/sited@1.0.0")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": TEXT}), encoding="utf-8")
    asked = ["route", "eval", "local/sited", "--data", f"new={tmp_path / 't.jsonl'}"]
    words = ["--prompt-tokens", "4", "--prompt-tokens", "900"]
    table = CliRunner().invoke(main, [*asked, *words]).output
    assert "prompt" in table and "900" in table and "weighed at each token" in table
    short, halved = json.loads(CliRunner().invoke(main, [*asked, *words, "--json", "-"]).stdout)["rows"]
    length = len(compose.tokenizer(BASE)(TEXT).input_ids)
    assert (short["items"], halved["items"]) == (length - 4, length - length // 2)


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(store, monkeypatch):
    router.fit(["law", "code"], "task", "local/named@1.0.0")
    monkeypatch.setattr("router.api.on_base", None)
    with pytest.raises(UsageError, match="'novel' is none"):
        router.evaluate("local/named", {"novel": [router.Text(TEXT)]})
    with pytest.raises(UsageError, match="names none"):
        router.explain("local/named", TEXT)
    for method in (name for name in SCORERS if SCORERS.get(name).continues):
        with pytest.raises(UsageError, match="is for members that continue texts, and 'mood' has a head"):
            router.fit(["mood", "topic"], method, "local/no@1.0.0", data={"mood": ["a"], "topic": ["b"]})
