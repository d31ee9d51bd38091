"""An adapter that is edited in place answers with its new values at the next call, whatever was laid out of the old."""

from __future__ import annotations

import pytest
import torch

import compose
from compose.kind.registry import kinds
from compose.runtime.model_runtime import activate, runtime

KINDS = sorted(kinds())


def near(ours, theirs):
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(ours, theirs, strict=True))


def model_of(tiny, kind):
    family = "bert" if kind == "head" else "llama"
    model = tiny.model(family, task="classification" if kind == "head" else "lm")
    return model, tiny.batch(family, tiny.rows(5, 3, 4))


def two(tiny, model, kind):
    """Two frozen adapters that differ in their parameters alone: a sparse one keeps its places."""
    adapters = [tiny.adapter(model, kind, name) for name in "ab"]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapters[1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return [adapter.freeze() for adapter in adapters]


def optimizer_step(adapter, new):
    for parameter, value in zip(adapter.parameters(), new, strict=True):
        parameter.grad = (parameter - value).detach()
    torch.optim.SGD(adapter.parameters(), lr=1.0).step()
    adapter.zero_grad()


def inside_no_grad(adapter, new):
    with torch.no_grad():
        for parameter, value in zip(adapter.parameters(), new, strict=True):
            parameter.copy_(value)


def data_in_place(adapter, new):
    for parameter, value in zip(adapter.parameters(), new, strict=True):
        parameter.data.zero_()
        parameter.data += value


def other_data(adapter, new):
    for parameter, value in zip(adapter.parameters(), new, strict=True):
        parameter.data = value


def detached(adapter, new):
    for parameter, value in zip(adapter.parameters(), new, strict=True):
        parameter.detach().copy_(value)


def state_dict(adapter, new, **options):
    values = dict(zip((name for name, _ in adapter.named_parameters()), new, strict=True))
    adapter.load_state_dict({**adapter.state_dict(), **values}, **options)


def assigned(adapter, new):
    state_dict(adapter, new, assign=True)


def tensors_of_state(adapter, new):
    values = {id(p): value for p, value in zip(adapter.parameters(), new, strict=True)}
    for parameter in adapter.parameters():
        held = next(t for t in adapter.state().values() if t.data_ptr() == parameter.data_ptr())
        held.copy_(values[id(parameter)])


def foreach(adapter, new):
    with torch.no_grad():
        torch._foreach_copy_([p.detach() for p in adapter.parameters()], new)


EDITS = [
    optimizer_step,
    inside_no_grad,
    data_in_place,
    other_data,
    detached,
    state_dict,
    assigned,
    tensors_of_state,
    foreach,
]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_edit_a_frozen_adapter_is_seen(tiny, kind, edit):
    model, batch = model_of(tiny, kind)
    adapter, other = two(tiny, model, kind)
    activate(model, "b")
    wanted = tiny.logits(model, batch)
    activate(model, "a")
    before = tiny.logits(model, batch)
    assert not near(before, wanted)
    edit(adapter, [p.detach().clone() for p in other.parameters()])
    assert near(tiny.logits(model, batch), wanted), "at the next call"
    activate(model, None)
    tiny.logits(model, batch)
    activate(model, "a")
    assert near(tiny.logits(model, batch), wanted), "and when it is made active again"


@pytest.mark.parametrize("edit", [inside_no_grad, data_in_place])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_row_of_its_own(tiny, kind, edit):
    model, batch = model_of(tiny, kind)
    adapter, other = two(tiny, model, kind)
    activate(model, ["b", None, "b"])
    wanted = tiny.logits(model, batch)
    activate(model, ["b", None, "a"])
    assert not near(tiny.logits(model, batch), wanted)
    with torch.inference_mode():
        tiny.logits(model, batch)
    edit(adapter, [p.detach().clone() for p in other.parameters()])
    assert near(tiny.logits(model, batch), wanted)


@pytest.mark.parametrize("edit", [inside_no_grad, data_in_place, state_dict])
@pytest.mark.parametrize("merge", ["ties(a, c, density=0.5)", "svd(a, c, rank=3)", "slerp(a, c, t=0.3)"])
def test_a_merge_of_it_is_made_again(tiny, merge, edit):
    model, batch = model_of(tiny, "lora")
    adapter, other = two(tiny, model, "lora")
    tiny.adapter(model, "lora", "c", seed=9).freeze()
    activate(model, merge.replace("a,", "b,"))
    wanted = tiny.logits(model, batch)
    activate(model, merge)
    assert not near(tiny.logits(model, batch), wanted)
    edit(adapter, [p.detach().clone() for p in other.parameters()])
    assert near(tiny.logits(model, batch), wanted)
    activate(model, None)
    activate(model, merge)
    assert near(tiny.logits(model, batch), wanted)
    runtime(model).remove("a")  # which the merge does not need any more
    assert near(tiny.logits(model, batch), wanted)


@pytest.mark.parametrize("shape", [(3,), (3, 5)])
def test_weights_that_are_edited(tiny, shape):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 5, 5))
    tiny.adapter(model, "lora", "a").freeze()
    tiny.adapter(model, "ia3", "b").freeze()
    weights = torch.zeros(shape)
    activate(model, "a + b", weights={"a": weights, "b": weights})
    bare = tiny.logits(model, batch)
    weights.fill_(0.5)
    half = tiny.logits(model, batch)
    assert not near(half, bare)
    activate(model, "0.5 * a + 0.5 * b")
    assert near(half, tiny.logits(model, batch))


@pytest.mark.parametrize("kind", ["dora", "lora", "bias"])
def test_weights_of_the_base_that_are_edited(tiny, kind):
    """DoRA takes its norms from them."""
    model, other = tiny.model("bert"), tiny.model("bert")
    batch = tiny.batch("bert", tiny.rows(5, 3))
    adapter = tiny.adapter(model, kind, "a").freeze()
    activate(model, "a")
    tiny.logits(model, batch)
    with torch.no_grad():
        for m in (model, other):
            for layer in m.bert.encoder.layer:
                layer.attention.self.query.weight.mul_(1.5)
                layer.attention.self.value.weight += 0.1
                layer.attention.self.value.bias += 0.3
    runtime(other).add("a", tiny.adapter(other, kind, "a").freeze()).load_state(adapter.state())
    activate(other, "a")
    assert near(tiny.logits(model, batch), tiny.logits(other, batch))


def test_nothing_is_made_anew_as_long_as_nothing_changes(tiny):
    model, batch = model_of(tiny, "lora")
    adapter = tiny.adapter(model, "lora", "a").freeze()
    tiny.adapter(model, "lora", "b").freeze()
    activate(model, "a")
    tiny.logits(model, batch)
    made = runtime(model).composition
    for read in (
        lambda: adapter.state(),
        lambda: [p.norm() for p in adapter.parameters()],
        lambda: [p.data for p in runtime(model).adapters["b"].parameters()],
        lambda: model.state_dict(),
        lambda: tiny.logits(model, batch),
    ):
        read()
        tiny.logits(model, batch)
        assert runtime(model).composition is made


def test_what_no_counter_shows_is_said_by_refresh(tiny):
    model, batch = model_of(tiny, "lora")
    adapter = tiny.adapter(model, "lora", "a").freeze()
    activate(model, "a")
    before = tiny.logits(model, batch)
    views = [p.numpy() for p in adapter.parameters()]  # the same memory, which torch does not watch
    tiny.logits(model, batch)
    for view in views:
        view *= 2
    compose.refresh(model)
    assert not near(tiny.logits(model, batch), before)


def test_adapters_made_in_inference_mode_are_watched_too(tiny):
    model, batch = model_of(tiny, "lora")
    with torch.inference_mode():
        adapter = tiny.adapter(model, "lora", "a").freeze()
    activate(model, "a")
    before = tiny.logits(model, batch)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)
    assert not near(tiny.logits(model, batch), before)
