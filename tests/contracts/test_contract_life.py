"""Identity at first, weights, save and load, eject: each kind on each family in each dtype."""

from __future__ import annotations

import pytest
import torch

from compose.formats.directory import read_adapter, save_adapter
from compose.runtime.model_runtime import activate, eject, runtime


@pytest.fixture
def texts(tiny, family):
    return tiny.batch(family, tiny.rows(5, 3, 6))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fresh_is_identity_and_weights_weigh(tiny, close, texts, kind, family, dtype):
    model = tiny.model(family, dtype)
    bare = tiny.logits(model, texts)
    fresh = tiny.adapter(model, kind, "a", noise=0.0)
    activate(model, "a")
    if fresh.identity_at_init:
        assert equal(tiny.logits(model, texts), bare), "a fresh adapter changes the outputs"

    tiny.adapter(model, kind, "a")
    live = tiny.logits(model, texts)
    assert max((a - b).abs().max() for a, b in zip(live, bare, strict=True)) > 0.05, "it has no effect at all"
    tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    runtime(model).adapters["a"].freeze()
    alone = tiny.logits(model, texts)
    close(alone, live, dtype)

    for nothing in ({"expr": None}, {"expr": "0 * a"}, {"expr": "a", "weights": {"a": 0.0}}):
        activate(model, **nothing)
        assert equal(tiny.logits(model, texts), bare), f"{nothing} changes the outputs"
    activate(model, "a + b", weights={"b": 0.0})
    assert equal(tiny.logits(model, texts), alone)
    activate(model, "a + b", weights={"a": torch.ones(3), "b": torch.zeros(3)})
    close(tiny.logits(model, texts), alone, dtype)
    activate(model, "a + b", weights={"a": torch.tensor([1.0, 0, 0]), "b": torch.zeros(3)})
    close(tiny.logits(model, texts), [alone[0], *bare[1:]], dtype)


def test_save_then_load_is_exact(tiny, texts, tmp_path, kind, family, dtype):
    model = tiny.model(family, dtype)
    sites = runtime(model).sites
    for stored in (torch.float32, torch.bfloat16):
        adapter = tiny.adapter(model, kind, "a").to(stored).freeze()
        activate(model, "a")
        outputs = tiny.logits(model, texts)
        save_adapter(adapter, tmp_path / str(stored), sites)

        again = read_adapter(tmp_path / str(stored), sites, model, name="again")
        assert again.state().keys() == adapter.state().keys()
        for key, tensor in adapter.state().items():
            assert again.state()[key].dtype == tensor.dtype
            assert tensor.dtype == stored or not tensor.is_floating_point()
            assert torch.equal(again.state()[key], tensor)
        assert not again.trainable
        runtime(model).add("again", again)
        activate(model, "again")
        assert equal(tiny.logits(model, texts), outputs)


def test_eject_restores_every_bit(tiny, photograph, same_photograph, texts, kind, family, dtype):
    model = tiny.model(family, dtype)
    for i, parameter in enumerate(model.parameters()):
        if parameter.dtype.is_floating_point:
            parameter.requires_grad_(i % 2 == 0)
    before, bare = photograph(model), tiny.logits(model, texts)

    tiny.adapter(model, kind, "a")
    tiny.adapter(model, kind, "b", size=1).freeze()
    activate(model, ["a", "a + b", None])
    tiny.logits(model, texts)
    model(**texts)  # with gradient: live factors hold a graph
    eject(model)

    same_photograph(before, photograph(model))
    assert equal(tiny.logits(model, texts), bare)
    eject(model)  # nothing left to do
