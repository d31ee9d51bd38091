"""Arithmetic in factor space against dense arithmetic, and the map of how adapters lie to one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compose
from compose.algebra import parse
from compose.errors import KindError
from compose.kernels import factors
from compose.kernels.low_rank import Pair
from compose.merging.interference import interference
from compose.parameter_space.effect import effect_of
from compose.runtime.model_runtime import runtime


def dense(pair: Pair) -> Tensor:
    return pair.scale * pair.B.double() @ pair.A.double()


def random_pairs(ranks: list[int], d_in: int, d_out: int, seed: int) -> list[Pair]:
    g = torch.Generator().manual_seed(seed)
    return [
        Pair(torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


shapes = given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    d_in=st.integers(1, 24),
    d_out=st.integers(1, 24),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=50, deadline=None)
@shapes
def test_inner_products_equal_dense_ones(ranks: list[int], d_in: int, d_out: int, seed: int) -> None:
    pairs = random_pairs(ranks, d_in, d_out, seed)
    deltas = torch.stack([dense(p).flatten() for p in pairs])
    wanted = deltas @ deltas.T
    found = factors.gram(pairs)
    scale = torch.stack([p.scale * p.B.double().norm() * p.A.double().norm() for p in pairs])  # a sum may cancel
    assert ((found - wanted).abs() <= 1e-5 * scale[:, None] * scale).all()
    for i, a in enumerate(pairs):
        for j, b in enumerate(pairs):
            assert math.isclose(factors.inner(a, b), float(wanted[i, j]), abs_tol=1e-5 * float(scale[i] * scale[j]))


def test_the_gram_matrix_is_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs([3, 5, 2], 12, 9, 0)
    whole = factors.gram(pairs)
    monkeypatch.setattr(factors, "_SLICE", 20)
    assert torch.allclose(factors.gram(pairs), whole, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@shapes
def test_the_core_is_a_singular_value_decomposition(ranks: list[int], d_in: int, d_out: int, seed: int) -> None:
    pairs = random_pairs(ranks, d_in, d_out, seed)
    whole = factors.stack(pairs, [1.0] * len(pairs))
    wanted = sum((dense(p) for p in pairs), torch.zeros(()))
    assert torch.allclose(dense(whole), wanted, atol=1e-4)
    left, s, vh = factors.core(whole)
    size = float(whole.A.norm() * whole.B.norm())  # a sum that cancels is as precise as its terms
    assert (left @ vh - wanted).norm() < 1e-5 * size
    assert torch.allclose(left.T @ left, torch.diag(s**2), atol=1e-4 * size**2)
    assert torch.allclose(vh @ vh.T, torch.eye(len(s)), atol=1e-4)
    assert torch.allclose(s, torch.linalg.svdvals(wanted)[: len(s)].float(), atol=1e-5 * size)


@settings(max_examples=40, deadline=None)
@shapes
def test_truncation_is_optimal_and_says_what_it_left_out(ranks: list[int], d_in: int, d_out: int, seed: int) -> None:
    whole = factors.stack(random_pairs(ranks, d_in, d_out, seed), [1.0] * len(ranks))
    rank = max(1, whole.rank // 2)
    small, left_out = factors.truncate(whole, rank)
    energy = float(dense(whole).square().sum())
    best = float(torch.linalg.svdvals(dense(whole))[rank:].square().sum())
    assert small.rank <= rank
    assert math.isclose(left_out, best, rel_tol=1e-3, abs_tol=1e-9 * energy)
    assert math.isclose(float((dense(whole) - dense(small)).square().sum()), best, rel_tol=1e-2, abs_tol=1e-9 * energy)
    same, nothing = factors.truncate(whole, whole.rank)
    assert same is whole and nothing == 0


@pytest.mark.parametrize("shape", [(20, 30), (300, 200), (200, 400)])
def test_a_dense_matrix_becomes_a_pair_with_an_exact_certificate(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(shape, generator=g)
    low = torch.randn(shape[0], 6, generator=g) @ torch.randn(6, shape[1], generator=g)
    exact, left_out = factors.from_dense(low, 6)
    assert left_out == 0 and (dense(exact) - low).norm() < 1e-5 * low.norm()
    pair, left_out = factors.from_dense(low + noise, 6)
    real = float((dense(pair) - (low + noise)).square().sum())
    best = float(torch.linalg.svdvals((low + noise).double())[6:].square().sum())
    assert math.isclose(left_out, real, rel_tol=1e-4)
    assert real <= 1.001 * best  # the power iterations bring the random range next to the best one
    flat, left_out = factors.from_dense(noise, 6)  # the hardest case: no spectrum to speak of
    assert left_out <= 1.01 * float(torch.linalg.svdvals(noise.double())[6:].square().sum())
    again, _ = factors.from_dense(noise, 6)
    assert torch.equal(again.A, flat.A)


def test_padding_changes_nothing() -> None:
    pair = random_pairs([3], 7, 5, 0)[0]
    padded = factors.pad(pair, 6)
    assert padded.rank == 6 and torch.allclose(dense(padded), dense(pair), atol=1e-6)


# -- effects and maps ----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny.model("gpt2")


@pytest.fixture
def add(tiny: Any, model: Any) -> Callable[..., Any]:
    def make(kind: str, name: str, **options: Any) -> Any:
        return tiny.adapter(model, kind, name, seed=sum(map(ord, name)), **options).freeze()

    return make


def dense_map(model: Any, names: list[str]) -> Tensor:
    home = runtime(model)
    paths = dict.fromkeys(p for n in names for p in parse(n).refs for p in home.adapters[p].paths)
    rows = []
    for name in names:
        effects = [effect_of(home, path, parse(name)) for path in paths]
        parts = [e.dense().flatten() for e in effects]
        parts += [torch.zeros(e.rows) if e.bias is None else e.bias for e in effects]
        rows.append(torch.cat(parts).double())
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def test_the_map_equals_the_dense_one_for_all_kinds_of_effects(model: Any, add: Any) -> None:
    for kind, name in (("lora", "a"), ("lora", "b"), ("dora", "d"), ("dora", "e"), ("ia3", "i"), ("bias", "c")):
        add(kind, name)
    names = ["a", "b", "d", "e", "i", "c", "a + 0.5 * d", "a >> i"]
    found = interference(model, names)
    wanted = dense_map(model, names)
    scale = wanted.diagonal().sqrt()
    assert ((found.inner - wanted).abs() <= 1e-4 * scale[:, None] * scale).all()
    assert torch.allclose(found.norms, scale, rtol=1e-4)
    assert torch.allclose(found.cosine.diagonal(), torch.ones(len(names), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(sum(found.by_place.values()), found.inner)
    place = next(iter(found.by_place))
    assert found.cosine_at(place).abs().max() <= 1


def test_duplicates_are_found_whatever_their_factors_look_like(model: Any, add: Any) -> None:
    a = add("lora", "a")
    b = add("lora", "b")
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    add("lora", "turned", lora_alpha=12.0)
    add("lora", "near")
    adapters = runtime(model).adapters
    with torch.no_grad():
        for path in a.paths:
            adapters["turned"].at(path, "A").copy_(mix @ a.at(path, "A"))
            adapters["turned"].at(path, "B").copy_(a.at(path, "B") @ mix.T / 2)  # half of it, at twice the scale
            adapters["near"].at(path, "A").copy_(b.at(path, "A"))
            adapters["near"].at(path, "B").copy_(1.05 * b.at(path, "B"))
    found = interference(model, ["a", "b", "turned", "near"])
    assert [(x, y) for x, y, _ in found.duplicates()] == [("a", "turned")]
    assert [(x, y) for x, y, _ in found.duplicates(0.06)] == [("a", "turned"), ("b", "near")]
    assert math.isclose(found.duplicates(0.06)[1][2], 0.05 / 1.05, rel_tol=1e-3)
    assert found.nearest("b", 2)[0][0] == "near" and len(found.nearest("b", 2)) == 2
    assert found.nearest("near", 1)[0][1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(KindError, match="not on this map"):
        found.nearest("c")


def test_kinds_that_are_no_weights_are_compared_among_themselves(model: Any, add: Any) -> None:
    for name in "pq":
        add("prompt", name)
    add("lora", "a")
    found = interference(model, ["p", "q"])
    p, q = (runtime(model).adapters[n].at("", "P").double() for n in "pq")
    assert math.isclose(float(found.inner[0, 1]), float((p * q).sum()), rel_tol=1e-5)
    with pytest.raises(KindError, match="cannot be compared"):
        interference(model, ["p", "a"])


def test_the_heat_map_is_drawn(model: Any, add: Any, tmp_path: Any) -> None:
    add("lora", "legal")
    add("lora", "medical")
    steps: list[tuple[str, int, int]] = []
    found = interference(model, ["legal", "medical"], progress=lambda *step: steps.append(step))
    text = found.heatmap(tmp_path / "map.svg").read_text()
    assert ("<svg" in text and "legal" in text) or text.count("<path") > 10
    assert found.heatmap(tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert found.as_dict()["names"] == ["legal", "medical"] and len(steps) == steps[-1][2]


def test_comparing_leaves_the_active_composition_alone(model: Any, add: Any) -> None:
    add("lora", "a")
    add("dora", "d")
    compose.activate(model, "a")
    rows = runtime(model).rows
    interference(model, ["a", "d"])
    assert runtime(model).rows == rows
