"""The modules that train whole have a learning rate of their own, whatever the method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.config import TrainConfig
from train.learner.heads import head_parameters
from train.loop import fit
from train.many import Job, fit_many
from train.method import Composite
from train.pipeline import prepare

RATE, HEAD_RATE = 1e-3, 8e-3
OPTIONS = {"mam": {"prefix_length": 2, "bottleneck_size": 4, "hidden": 8}}


def ready_for(method, base, reviews, **changes):
    values = {"base": base, "task": "classification", "data": {"train": reviews(), "eval": 0.25}, "max_length": 16}
    rates = {"lr": RATE, "head_lr": HEAD_RATE, "schedule": "constant", "warmup": 0.0, "clip": 0.0}
    run = {"method": method, "options": OPTIONS.get(method, {}), "batch_size": 8, "duration": 1, **values, **rates}
    return prepare(TrainConfig(**{**run, **changes}))


def trained(ready, **options):
    rows = ready.splits.train, ready.splits.eval
    return fit(ready.model, ready.adapter, *rows, ready.config, method=ready.method, **options)


@pytest.mark.parametrize("method", ["lora", "full", "houlsby", "mam", "sora", "feature_based"])
def test_the_first_step_is_as_large_as_the_rate_of_what_moves(bert_base, reviews, method):
    """AdamW's first step is its rate times the gradient's sign."""
    ready = ready_for(method, bert_base, reviews)
    heads = {id(p) for p in head_parameters(ready.adapter)}
    before = {p: p.detach().clone() for p in ready.adapter.parameters()}
    assert isinstance(ready.adapter, Composite) == (method == "mam")
    assert not heads & {id(p) for name, p in ready.adapter.named_parameters() if "LayerNorm" in name}  # Houlsby's
    trained(ready)
    moved = {True: [], False: []}
    for p, old in before.items():
        moved[id(p) in heads].append(float((p.detach() - old).abs().max()))
    assert max(moved[True]) == pytest.approx(HEAD_RATE, rel=1e-3)
    if method == "feature_based":  # the head is all there is
        assert not moved[False]
    elif method != "sora":  # whose gates also shrink
        assert max(moved[False]) == pytest.approx(RATE, rel=1e-3)


def test_a_run_with_two_rates_resumes_bit_for_bit(bert_base, reviews, tmp_path, interrupt):
    straight, stopped, resumed = (
        ready_for("lora", bert_base, reviews, duration=6, schedule="cosine", eval_every=2) for _ in range(3)
    )
    whole = trained(straight)
    with pytest.raises(KeyboardInterrupt):
        trained(stopped, out=tmp_path, save_every=5, watch=interrupt(5))
    again = trained(resumed, out=tmp_path, resume=True)
    assert again.best == whole.best
    for key, value in straight.adapter.state().items():
        assert torch.equal(value, resumed.adapter.state()[key]), key


def test_a_head_among_many_learns_as_it_does_alone(bert_base, reviews):
    alone, together = (ready_for("lora", bert_base, reviews, duration=4, schedule="linear") for _ in range(2))
    for module in (*alone.model.modules(), *together.model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained(alone)
    fit_many(together.model, [Job(together.adapter, together.splits.train, together.config, together.splits.eval)])
    for key, value in alone.adapter.state().items():
        torch.testing.assert_close(together.adapter.state()[key], value, rtol=1e-4, atol=1e-6)
