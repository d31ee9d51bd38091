"""A pair that trains alone: one node of the graph, with the outputs and gradients of the formula written out."""

from __future__ import annotations

import pytest
import torch

from compose.runtime.model_runtime import activate, runtime
from compose.slots import low_rank_autograd as learning


def learned(model, adapter, batch, **autocast):
    """Logits, and the gradients of the adapter."""
    adapter.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
        logits = model(**batch).logits
        logits.float().square().mean().backward()
    return [logits.detach().float(), *(p.grad.clone().float() for p in adapter.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("family", "dtype", "autocast"),
    [
        ("llama", "fp32", False),
        ("bert", "fp32", True),
        ("llama", "bf16", False),
        ("bert", "bf16", True),
        ("qwen2", "nf4", False),
        ("llama", "nf4", True),
    ],
)
def test_gradients_are_those_of_the_formula(tiny, monkeypatch, family, dtype, autocast, dropout):
    model = tiny.model(family, dtype).train()
    adapter = tiny.adapter(model, "lora", "a", target_modules="all-linear", lora_dropout=dropout, noise=0.1)
    activate(model, "0.5 * a")
    batch = tiny.batch(family, tiny.rows(5, 3))
    calls = []
    apply = learning.apply
    monkeypatch.setattr(learning, "apply", lambda *given: calls.append(given[0]) or apply(*given))
    ours = learned(model, adapter, batch, enabled=autocast)
    assert len(calls) == len(adapter.paths)  # everywhere
    monkeypatch.setattr(learning, "fits", lambda *_: False)
    written_out = learned(model, adapter, batch, enabled=autocast)
    assert len(calls) == len(adapter.paths)
    bound = 0.1 if dtype == "bf16" or autocast else 1e-5  # of the gradients' size: bf16 rounds at other places
    for a, b in zip(ours, written_out, strict=True):
        assert (a - b).norm() <= bound * b.norm()


def test_nothing_is_asked_of_a_base_that_no_gradient_enters(tiny, monkeypatch):
    """The first layer's input is frozen: its weight is not read a second time."""
    model = tiny.model("llama", "nf4")
    adapter = tiny.adapter(model, "lora", "a", target_modules=["q_proj", "v_proj"], layers=[0])
    activate(model, "a")
    loss = model(**tiny.batch("llama", tiny.rows(4))).logits.square().mean()
    reads, read = [], learning.dense_weight
    monkeypatch.setattr(learning, "dense_weight", lambda layer: reads.append(layer) or read(layer))
    loss.backward()
    assert reads == []
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_second_derivative_is_refused_not_wrong(tiny):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "lora", "a", noise=0.1)
    activate(model, "a")
    loss = model(**tiny.batch("llama", tiny.rows(4))).logits.square().mean()
    (first, *_) = torch.autograd.grad(loss, list(adapter.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
    assert runtime(model).adapters["a"] is adapter
