"""Every registered kind goes through the loop: it learns, resumes exactly, and reloads from its artifact."""

from __future__ import annotations

import pytest
import torch

import compose
from compose.kind.registry import get_kind, kinds
from hub.errors import HubError
from hub.store import Store
from train.loop import fit
from train.results.publish import publish
from train.steps.evaluate import evaluate


def made(tiny, kind, dtype="fp32", **options):
    model = tiny.model("llama", dtype)
    adapter = compose.create(model, kind, {**tiny.options(kind), **options}, name="a", seed=3)
    compose.activate(model, "a")
    return model, adapter


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_it_learns_and_what_is_published_does_the_same(tiny, data, config, kind, tmp_path):
    model, adapter = made(tiny, kind)
    held = data(1)
    before = evaluate(model, held)["loss"]
    run = config(method=kind, duration="10 epochs", lr=0.03)
    result = fit(model, adapter, data(0), held, run)
    assert result.best["loss"] < before - 0.05
    artifact = publish(
        tmp_path / "a",
        adapter,
        model,
        run,
        result,
        ref=f"me/{kind}@1.0",
        data={"toy": data(0).digest},
        evaluated_on=held,
    )
    assert artifact.manifest.kind == kind
    assert artifact.manifest.lineage.data == {"toy": data(0).digest}
    assert artifact.manifest.metrics[0].dataset_digest == held.digest
    batch = tiny.batch("llama", tiny.rows(5, 3, 6))
    learned = tiny.logits(model, batch)
    other = tiny.model("llama")
    compose.attach(other, "b", Store().get(f"me/{kind}"))
    compose.activate(other, "b")
    for row, expected in zip(tiny.logits(other, batch), learned, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_it_resumes_bit_for_bit(tiny, data, config, kind, tmp_path, interrupt):
    run = config(method=kind, duration=6, eval_every=2, schedule="cosine")
    dropout = {name: 0.2 for name in get_kind(kind).Config.model_fields if name.endswith("dropout")}
    straight, stopped, resumed = (made(tiny, kind, **dropout) for _ in range(3))
    whole = fit(*straight, data(0), data(1), run)
    with pytest.raises(KeyboardInterrupt):
        fit(*stopped, data(0), data(1), run, out=tmp_path, save_every=5, watch=interrupt(5))
    again = fit(*resumed, data(0), data(1), run, out=tmp_path, resume=True)
    assert again.best == whole.best
    for key, value in straight[1].state().items():
        assert torch.equal(value, resumed[1].state()[key]), key


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_a_step_over_a_reduced_base_is_split_invariant_too(tiny, data, config, dtype):
    losses = []
    for micro in (None, 3):
        model, adapter = made(tiny, "lora", dtype)
        result = fit(model, adapter, data(0), None, config(micro_batch=micro, duration=3))
        losses.append([r["loss"] for r in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if dtype == "bf16" else 1e-4)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_gradient_checkpointing_gives_the_same_updates(tiny, data, config, kind):
    states = []
    for recompute in (False, True):
        model, adapter = made(tiny, kind)
        fit(model, adapter, data(0), None, config(duration=3, gradient_checkpointing=recompute))
        assert not model.is_activation_checkpointing
        states.append(adapter.state())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-7)


def test_an_adapter_that_is_not_active_is_refused(tiny, data, config):
    model = tiny.model("llama")
    adapter = compose.create(model, "lora", {"r": 2}, name="a")
    with pytest.raises(HubError, match=r"of 8 parameters get no gradient") as caught:
        fit(model, adapter, data(0), None, config())
    assert "compose.activate" in caught.value.hint
