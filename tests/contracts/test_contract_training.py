"""Gradients reach the adapter and nothing else; the base stays as it is, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compose.runtime.model_runtime import activate, runtime


def loss_of(model, batch):
    return model(**batch).logits.float().square().mean()


def test_only_the_adapter_learns(tiny, close, kind, family, dtype):
    model = tiny.model(family, dtype)
    base = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: tensor.detach().clone() for name, tensor in base.items()}
    batch = tiny.batch(family, tiny.rows(5, 3, 6))
    tiny.adapter(model, kind, "frozen", seed=3).freeze()
    adapter = tiny.adapter(model, kind, "a", noise=0.1)
    activate(model, "a")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.1)

    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(parameter.grad).all()
        optimizer.step()

    # Adding one vector to all keys changes no attention: the bias of k alone may have no gradient worth the name.
    keys = {s.path.replace(".", "/") for s in runtime(model).sites.with_role("attn.k")}
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().max() > 0 or name.split(":")[0] in keys, f"the gradient of {name} is zero"
    assert losses[2] < losses[0]
    for name, tensor in base.items():
        assert torch.equal(tensor, before[name]), f"{name} of the base changed"
        assert tensor.grad is None, f"{name} of the base got a gradient"
    assert all(p.grad is None for p in runtime(model).adapters["frozen"].parameters())

    after_the_last_step = tiny.logits(model, batch)
    adapter.freeze()
    close(tiny.logits(model, batch), after_the_last_step, dtype)
    activate(model, "a")
    close(tiny.logits(model, batch), after_the_last_step, dtype)


def test_rows_of_a_mixed_batch_learn_apart(tiny, kind):
    """The gradient of a batch of rows with their own adapters is that of each row by itself."""
    model = tiny.model("llama")
    rows = tiny.rows(5, 3, 4)
    adapters = [tiny.adapter(model, kind, name, seed=i, size=i) for i, name in enumerate("ab")]
    exprs = ["a", None, "b"]

    def gradients():
        found = [[p.grad.clone() for p in a.parameters()] for a in adapters]
        model.zero_grad()
        return found

    for row, expr in zip(rows, exprs, strict=True):
        activate(model, expr)
        if expr:
            model(**tiny.batch("llama", [row])).logits.square().sum().backward()
    apart = gradients()
    activate(model, exprs)
    batch = tiny.batch("llama", rows, "left")
    kept = model(**batch).logits.square() * batch["attention_mask"][..., None]
    kept.sum().backward()
    for one, other in zip(gradients(), apart, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
@pytest.mark.parametrize("place", ["llama", "t5", "opt"])
def test_checkpointing_gives_the_same_gradients(tiny, kind, place, reentrant):
    options = {"t5": {"dropout_rate": 0.0}, "opt": {"dropout": 0.0}}.get(place, {})
    model = tiny.model(place, **options)
    options = {"style": "parallel"} if kind == "bottleneck" else {}  # which reads another site's input
    adapter = tiny.adapter(model, kind, "a", **options)
    tiny.adapter(model, "lora", "l", seed=4)
    batch = tiny.batch(place, tiny.rows(5, 3))
    activate(model, ["a", "l >> a"])

    def gradients():
        model.zero_grad()
        model(**batch, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())


def test_autocast(tiny, kind):
    """Mixed precision: a float32 model and adapters, bfloat16 inside; live and frozen, apart and by row."""
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3, 4))
    adapter, _ = tiny.adapter(model, kind, "a"), tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    for composition in ("a", "a + b", ["a", None, "b"]):
        adapter.unfreeze()
        activate(model, composition)
        exact = model(**batch).logits.detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            live = model(**batch).logits
            live.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in adapter.parameters())
        adapter.freeze()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            frozen = model(**batch).logits
        for ours in (live.detach(), frozen):
            assert (ours.float() - exact).abs().max() <= 0.1 * exact.abs().max()
