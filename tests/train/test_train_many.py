"""Many adapters in one pass learn what each learns by itself."""

from __future__ import annotations

import pytest
import torch

import compose
from hub.errors import UsageError
from train.data.batches import Dataset, Ragged
from train.errors import NonFiniteLoss
from train.loop import fit
from train.many import Job, fit_many
from train.steps.objective import loss_sum

KINDS = ("lora", "dora", "bottleneck", "ia3", "bias", "prefix", "prompt", "krona")


def rows_of(seed, rows=20):
    """Language-modelling rows with a step of their own."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (rows,), generator=random).tolist()
    ids = [[4 + (7 * i + (2 + seed) * j) % 49 for j in range(n)] for i, n in enumerate(lengths)]
    return Dataset({"input_ids": Ragged.of(ids)}, "causal_lm", pad_id=1, source=f"rows {seed}")


@pytest.fixture
def jobs(tiny, config):
    def make(model):
        found = []
        for i, kind in enumerate(KINDS):
            adapter = compose.create(model, kind, tiny.options(kind), name=f"a{i}", seed=i)
            run = config(lr=0.01 * (1 + i % 3), seed=i, duration=4 + i % 2, batch_size=3 + i % 2, clip=0.5, warmup=0.3)
            found.append(Job(adapter, rows_of(i), run, rows_of(i + 50) if i % 2 else None))
        return found

    return make


@pytest.mark.parametrize("limit", [None, 5])
def test_eight_kinds_at_once_equal_eight_runs(tiny, jobs, limit):
    together = tiny.model("llama")
    many = jobs(together)
    results = fit_many(together, many, rows=limit)
    apart = tiny.model("llama")
    for job, other in zip(many, jobs(apart), strict=True):
        name = job.adapter.name
        compose.activate(apart, name)
        alone = fit(apart, other.adapter, other.train, other.eval, other.config)
        ours, theirs = ([r["loss"] for r in found.history if "loss" in r] for found in (results[name], alone))
        assert ours == pytest.approx(theirs, rel=1e-4), job.adapter.kind
        norms = [[r["grad_norm"] for r in found.history if "loss" in r] for found in (results[name], alone)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-3)
        for key, value in other.adapter.state().items():
            torch.testing.assert_close(job.adapter.state()[key], value, rtol=2e-3, atol=2e-4)
        assert (results[name].best is None) == (alone.best is None)
        if alone.best:
            assert results[name].best["step"] == alone.best["step"]
            assert results[name].best["loss"] == pytest.approx(alone.best["loss"], rel=1e-4)


def test_each_stops_by_itself_and_has_its_own_loss(tiny, config):
    model = tiny.model("llama")
    made = {name: compose.create(model, "lora", {"r": 2}, name=name, seed=1) for name in ("worse", "better", "still")}
    seen = []

    def half(task, logits, labels):
        seen.append(labels.shape)
        return 0.5 * loss_sum(task, logits, labels)

    held, values = rows_of(90), {"duration": 12, "eval_every": 1, "batch_size": 4}
    results = fit_many(
        model,
        [
            Job(made["worse"], rows_of(1), config(lr=5.0, patience=2, clip=0.0, **values), held),
            Job(made["better"], rows_of(1), config(lr=1e-3, patience=12, **values), rows_of(1)),
            Job(made["still"], rows_of(1), config(lr=1e-3, **values), loss=half),
        ],
    )
    assert results["worse"].stopped == "patience"
    assert results["worse"].steps < 12
    assert (results["better"].steps, results["better"].stopped) == (12, "finished")
    assert len(seen) == 12
    first = [results[name].history[0]["loss"] for name in ("better", "still")]
    assert first[0] == pytest.approx(2 * first[1], rel=1e-5)
    assert compose.runtime.model_runtime.runtime(model).rows == (compose.runtime.model_runtime.IDENTITY,)


def test_a_job_that_breaks_is_named(tiny, config):
    model = tiny.model("llama")
    made = [compose.create(model, "lora", {"r": 2}, name=name) for name in ("good", "bad")]
    broken = lambda task, logits, labels: loss_sum(task, logits, labels) * float("nan")  # noqa: E731
    with pytest.raises(NonFiniteLoss, match="adapter 'bad', step 1"):
        fit_many(model, [Job(made[0], rows_of(1), config()), Job(made[1], rows_of(2), config(), loss=broken)])
    with pytest.raises(UsageError, match="an adapter of its own"):
        fit_many(model, [Job(made[0], rows_of(1), config()), Job(made[0], rows_of(2), config())])
