"""Merges that measure something on data: checked against formulas in double precision, and refused without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import compose
from compose.errors import KindError
from compose.merging import measure
from compose.merging.merge import merge
from compose.parameter_space.method import elementwise, methods
from compose.parameter_space.statistic import InputGram
from compose.runtime.model_runtime import runtime

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"
MEASURING = sorted(name for name, method in methods().items() if method.needs is not None)


@pytest.fixture
def bench(lab: Any) -> Any:
    """Two LoRAs on a tiny llama, and batches with padding for each."""
    made = lab()
    made.add("lora", "a", "b", size=3, target_modules="all-linear")
    generator = torch.Generator().manual_seed(0)
    made.data = {}
    for name, rows in {"a": 24, "b": 40}.items():
        ids = torch.randint(3, made.model.config.vocab_size, (rows, 11), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 7:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        made.data[name] = [
            {"input_ids": i, "attention_mask": m, "labels": y}
            for i, m, y in zip(ids.split(8), mask.split(8), labels.split(8), strict=True)
        ]
    return made


def inputs(lab: Any, name: str, path: str) -> Tensor:
    """What enters a layer with one adapter active, without padding, (n, d_in) in double precision."""
    seen: list[Tensor] = []
    compose.activate(lab.model, name)
    layer = runtime(lab.model).slot(path).layer
    for batch in lab.data[name]:
        hook = layer.register_forward_pre_hook(lambda _, args, m=batch["attention_mask"]: seen.append(args[0][m == 1]))
        lab.model(**batch)
        hook.remove()
    compose.activate(lab.model, None)
    return torch.cat(seen).double()


def delta(lab: Any, name: str, path: str) -> Tensor:
    return lab.delta(name, path).double()


@pytest.mark.parametrize("path", [Q, DOWN])
@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_regmean_is_its_closed_form(bench: Any, path: str, alpha: float) -> None:
    made = merge(bench.model, f"regmean(a, b, alpha={alpha})", name="m", data=bench.data)
    assert made.certificate.exact
    x = {name: inputs(bench, name, path) for name in "ab"}
    grams = {name: alpha * v.T @ v + (1 - alpha) * torch.diag((v * v).sum(0)) for name, v in x.items()}
    right = sum(delta(bench, name, path) @ grams[name] for name in "ab")
    expected = torch.linalg.solve(sum(grams.values()), right.T).T
    compose.attach(bench.model, "m", made.adapter)
    torch.testing.assert_close(delta(bench, "m", path), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("path", [Q, DOWN])
def test_regmean_is_nearer_to_each_on_its_inputs_than_the_average(bench: Any, path: str) -> None:
    for name, expr in {"mean": "average(a, b)", "m": "regmean(a, b, alpha=1.0)"}.items():
        compose.attach(bench.model, name, merge(bench.model, expr, name=name, data=bench.data).adapter)
    x = {name: inputs(bench, name, path) for name in "ab"}

    def error(name: str) -> float:
        apart = ((delta(bench, name, path) - delta(bench, i, path)) @ v.T for i, v in x.items())
        return float(sum(d.square().sum() for d in apart))

    assert error("m") < 0.95 * error("mean")
    moved = delta(bench, "m", path)
    noise = 1e-3 * moved.norm() * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1)).double()
    least = error("m")
    for step in (noise, -noise):  # it is the minimum, not only better
        apart = ((moved + step - delta(bench, i, path)) @ v.T for i, v in x.items())
        assert float(sum(d.square().sum() for d in apart)) > least


def test_where_no_data_is_regmean_is_the_mean(bench: Any) -> None:
    few = {name: [{key: value[:1, :2] for key, value in batches[0].items()}] for name, batches in bench.data.items()}
    made = merge(bench.model, "regmean(a, b, weights=[1, 3], alpha=1.0)", name="m", data=few)
    compose.attach(bench.model, "m", made.adapter)
    seen = torch.cat([runs[0].double() for runs in [few_inputs(bench, few, name) for name in "ab"]])
    null = torch.linalg.svd(seen, full_matrices=True).Vh[len(seen) :]  # directions that no input has
    mean = 0.25 * delta(bench, "a", Q) + 0.75 * delta(bench, "b", Q)
    torch.testing.assert_close(delta(bench, "m", Q) @ null.T, mean @ null.T, atol=1e-5, rtol=1e-3)


def few_inputs(lab: Any, data: Any, name: str) -> list[Tensor]:
    whole, lab.data = lab.data, data
    try:
        return [inputs(lab, name, Q)]
    finally:
        lab.data = whole


def test_fisher_is_its_formula(bench: Any) -> None:
    made = merge(
        bench.model, "fisher(a, b, weights=[1, 2], rank=16)", name="m", data=bench.data
    )  # 16 is all that V has
    weight = runtime(bench.model).slot(V).layer.weight
    information = []
    for name in "ab":
        compose.activate(bench.model, name)
        total = torch.zeros_like(weight, dtype=torch.float64)
        for batch in bench.data[name]:
            for i in range(8):
                weight.requires_grad_(True)
                loss = bench.model(**{key: value[i : i + 1] for key, value in batch.items()}).loss
                (gradient,) = torch.autograd.grad(loss, weight)  # of W, to which the delta is added
                weight.requires_grad_(False)
                total += gradient.double().square()
        information.append(total)
    compose.activate(bench.model, None)
    f_a, f_b = information[0], 2 * information[1]
    expected = (f_a * delta(bench, "a", V) + f_b * delta(bench, "b", V)) / (f_a + f_b)
    compose.attach(bench.model, "m", made.adapter)
    torch.testing.assert_close(delta(bench, "m", V), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", MEASURING)
def test_sites_measured_one_by_one_give_the_same(bench: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = merge(bench.model, f"{name}(a, b)", data=bench.data).adapter
    monkeypatch.setattr(measure, "_ROOM", 0)
    one_by_one = merge(bench.model, f"{name}(a, b)", data=bench.data).adapter
    for key, value in at_once.state().items():
        torch.testing.assert_close(one_by_one.state()[key], value)


@pytest.mark.parametrize("name", MEASURING)
def test_nothing_is_left_behind(bench: Any, name: str) -> None:
    compose.activate(bench.model, "a")
    before, residents = bench.logits("a"), set(runtime(bench.model).adapters)
    merge(bench.model, f"{name}(svd(a, b), b)", data=bench.data["a"])
    assert set(runtime(bench.model).adapters) == residents
    assert str(runtime(bench.model).rows[0]) == "a"
    assert torch.equal(bench.logits("a"), before)
    layer = runtime(bench.model).slot(Q).layer
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("name", MEASURING)
def test_without_data_it_is_refused_before_anything_is_merged(
    bench: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compose.parameter_space.deltas.merge", lambda job: pytest.fail(f"{job.text} was carried out"))
    for use in (merge, compose.activate):
        for expr in (f"{name}(a, b)", f"ties(ties(a, b), {name}(a, b))"):
            with pytest.raises(KindError, match=f"{name} measures its adapters on data") as refused:
                use(bench.model, expr)
            assert "--data FILE" in str(refused.value.hint)


def test_what_is_wrong_with_data_is_named(bench: Any) -> None:
    def refused(data: Any, match: str, expr: str = "regmean(a, b)") -> None:
        with pytest.raises(KindError, match=match):
            merge(bench.model, expr, data=data)

    batches = bench.data["a"]
    refused({"a": batches}, "no data for 'b'")
    refused({"a": batches, "b": batches, "c": batches}, "'c', which is no argument")
    refused([], "data for 'a' is empty")
    refused([{"input_ids": batches[0]["input_ids"]}], "without labels", "fisher(a, b)")


def test_kinds_that_have_no_such_layers_are_named(bench: Any) -> None:
    bench.add("ia3", "i", "j")
    bench.add("dora", "d", size=3)
    for expr, match in {
        "regmean(i, j)": "regmean works on low-rank deltas",
        "regmean(a, d)": "changes .* by more than a pair",
        "fisher(a, d)": "scales rows of",
    }.items():
        with pytest.raises(KindError, match=match):
            merge(bench.model, expr, data=bench.data["a"])


def test_an_elementwise_merge_may_ask_for_activations(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from compose import function

    monkeypatch.setattr(function.FUNCTIONS, "_known", dict(function.functions()))
    monkeypatch.setattr(function.MERGES, "_known", dict(function.MERGES.all()))

    @elementwise("by_input", "Columns weighted by the size of their input.", paper="", needs=InputGram)
    def by_input(stack: Tensor, o: Any, grams: list[Tensor]) -> Tensor:
        sizes = torch.stack([gram.diag() for gram in grams])[:, None]  # (N, 1, d_in)
        return (sizes * stack).sum(0) / sizes.sum(0)

    made = merge(bench.model, "by_input(a, b)", name="m", data=bench.data)
    assert made.adapter.kind == "dense"
    assert made.certificate.exact
