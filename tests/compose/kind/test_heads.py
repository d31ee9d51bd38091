"""Heads of their own: rows with other classes share a batch, stored heads bring their own width."""

from __future__ import annotations

import pytest
import torch

import compose
from compose.formats.directory import save_adapter
from compose.runtime.model_runtime import activate, runtime


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_rows_have_heads_of_their_own(tiny, close, family):
    model = tiny.model(family, task="classification")  # three classes
    for name, classes in (("two", 2), ("five", 5)):
        tiny.adapter(model, "head", name, num_labels=classes).freeze()
    tiny.adapter(model, "lora", "l").freeze()
    rows, exprs = tiny.rows(5, 3, 4, 6), ["two", "l >> five", None, "0.5 * two + 0.5 * two"]
    alone = []
    for row, expr in zip(rows, exprs, strict=True):
        activate(model, expr)
        alone += tiny.logits(model, tiny.batch(family, [row]))
    assert [len(y) for y in alone] == [2, 5, 3, 2]
    activate(model, exprs)
    together = tiny.logits(model, tiny.batch(family, rows))
    close([y[: len(a)] for y, a in zip(together, alone, strict=True)], alone)
    for y, a in zip(together, alone, strict=True):
        assert y[: len(a)].argmax() == y.argmax()
        assert torch.equal(y.softmax(-1)[len(a) :], torch.zeros(5 - len(a)))  # the classes it does not have


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_a_stored_head_may_have_other_classes(tiny, kind, tmp_path):
    """Whether alone or carried along by an adapter that was trained on a base with five classes."""
    there = tiny.model("bert", task="classification", num_labels=5)
    options = {} if kind == "head" else {"modules_to_save": ["classifier"]}
    adapter = tiny.adapter(there, kind, "a", **options).freeze()
    activate(there, "a")
    batch = tiny.batch("bert", tiny.rows(5, 3))
    expected = tiny.logits(there, batch)
    save_adapter(adapter, tmp_path, runtime(there).sites)
    here = tiny.model("bert", task="classification")
    with torch.no_grad():
        for name, parameter in here.named_parameters():
            if not name.startswith("classifier"):
                parameter.copy_(there.get_parameter(name))
    compose.attach(here, "a", tmp_path)
    activate(here, "a")
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(here, batch), expected, strict=True))
