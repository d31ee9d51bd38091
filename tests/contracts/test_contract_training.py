"""Gradients reach the adapter and nothing else; the base stays as it is, bit for bit."""

from __future__ import annotations

import torch

from compose.inject import activate, runtime


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
