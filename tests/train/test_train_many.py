"""Many adapters in one pass learn what each learns by itself."""

from __future__ import annotations

import pytest
import torch

import compose
from compose.expr.tree import IDENTITY
from compose.kind.registry import kinds
from hub.errors import UsageError
from train.data.batches import Dataset, Ragged
from train.data.datasets import completions
from train.errors import NonFiniteLoss
from train.loop import fit
from train.many import Job, fit_many
from train.method import Method, make_method, methods, why_alone

SIZES = {"r": 4, "lora_alpha": 6.0, "num_virtual_tokens": 3, "bottleneck_size": 8, "hidden": 16, "prefix_length": 3}
SIZES |= {"copies": 2, "density": 0.05, "top": 1, "first": 0.4, "alpha_init": 1.0, "sparsity": 2.0, "lora_dropout": 0.0}
RUN = {"lr": 0.01, "duration": 5, "batch_size": 4, "clip": 0.5, "warmup": 0.3, "eval_every": 2}
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


def begun(model, config, name, adapter_name, seed):
    """What a method trains, beside others on one model, and how."""
    cls = methods()[name]
    fields = {*cls.Options.model_fields, *(kinds()[cls.kind].Config.model_fields if cls.kind in kinds() else ())}
    options = {key: value for key, value in SIZES.items() if key in fields}
    run = config(method=name, options=options, seed=seed, precision="fp32", **RUN)
    method, run = make_method(run)
    method.adapter_name = adapter_name
    learner = method.build(model, seed=seed)
    method.warm(model, learner, rows_of(seed))
    return Job(learner, rows_of(seed), run, rows_of(seed + 50), method)


@pytest.mark.parametrize("name", methods())
def test_every_method_trains_beside_another_as_it_does_alone_or_is_refused_by_name(tiny, config, name):
    together, apart = (tiny.model("llama", num_hidden_layers=4) for _ in range(2))
    pair = ((name, "one", 1), ("lora", "other", 2))
    many, alone = ([begun(model, config, *of) for of in pair] for model in (together, apart))
    if why_alone(many[0].method):
        with pytest.raises(UsageError, match=f"method '{name}' cannot share a pass: "):
            fit_many(together, many)
        return
    results = fit_many(together, many)
    for job, other in zip(many, alone, strict=True):
        compose.activate(apart, other.expression)
        single = fit(apart, other.adapter, other.train, other.eval, other.config, method=other.method)
        for key, near in (("loss", 1e-4), ("grad_norm", 2e-3)):
            ours, theirs = ([r[key] for r in of.history if key in r] for of in (results[job.name], single))
            assert ours == pytest.approx(theirs, rel=near), key
        trained = job.adapter.state_dict()
        for key, value in other.adapter.state_dict().items():
            torch.testing.assert_close(trained[key], value, rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")
        assert results[job.name].best["step"] == single.best["step"]


def test_a_method_that_reads_several_rows_for_each_shares_a_pass_too(tiny, config, tokenizer):
    data = completions(tokenizer, ["Is it?", "Well, is it not?", "Was it?"], [" yes", " no way", " yes"], 32)
    losses = {}
    for beside in (False, True):
        model = tiny.model("llama", vocab_size=len(tokenizer))
        method, run = make_method(config(method="t_few", options={"choices": [" yes", " no way"]}, duration=3))
        learner = method.build(model, tokenizer=tokenizer)
        if beside:
            other = compose.create(model, "lora", {"r": 2}, name="other")
            longer = completions(tokenizer, ["It is so, or so they say. " * 2] * 3, [" yes"] * 3, 48)
            jobs = [Job(other, longer, config(duration=3)), Job(learner, data, run, method=method)]
            losses[beside] = [r["loss"] for r in fit_many(model, jobs)["trained"].history]
        else:
            losses[beside] = [r["loss"] for r in fit(model, learner, data, None, run, method=method).history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_each_stops_by_itself_and_has_its_own_loss(tiny, config):
    model = tiny.model("llama")
    made = {name: compose.create(model, "lora", {"r": 2}, name=name, seed=1) for name in ("worse", "better", "still")}
    seen = []

    class Half(Method):
        def objective(self, logits, batch, task):
            seen.append(batch["labels"].shape)
            return 0.5 * super().objective(logits, batch, task)

    held, values = rows_of(90), {"duration": 12, "eval_every": 1, "batch_size": 4}
    results = fit_many(
        model,
        [
            Job(made["worse"], rows_of(1), config(lr=5.0, patience=2, clip=0.0, **values), held),
            Job(made["better"], rows_of(1), config(lr=1e-3, patience=12, **values), rows_of(1)),
            Job(made["still"], rows_of(1), config(lr=1e-3, **values), method=Half()),
        ],
    )
    assert results["worse"].stopped == "patience"
    assert results["worse"].steps < 12
    assert (results["better"].steps, results["better"].stopped) == (12, "finished")
    assert len(seen) == 12
    first = [results[name].history[0]["loss"] for name in ("better", "still")]
    assert first[0] == pytest.approx(2 * first[1], rel=1e-5)
    assert compose.runtime.model_runtime.runtime(model).rows == (IDENTITY,)


def test_a_job_that_breaks_is_named(tiny, config):
    model = tiny.model("llama")
    made = [compose.create(model, "lora", {"r": 2}, name=name) for name in ("good", "bad")]

    class Broken(Method):
        def objective(self, logits, batch, task):
            return super().objective(logits, batch, task) * float("nan")

    with pytest.raises(NonFiniteLoss, match="adapter 'bad', step 1"):
        fit_many(model, [Job(made[0], rows_of(1), config()), Job(made[1], rows_of(2), config(), method=Broken())])
    with pytest.raises(UsageError, match="an adapter of its own"):
        fit_many(model, [Job(made[0], rows_of(1), config()), Job(made[0], rows_of(2), config())])
