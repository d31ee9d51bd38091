"""Each merge against its definition, computed by hand on dense deltas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compose.merging.merge import merge
from compose.parameter_space import blocks
from compose.runtime.model_runtime import runtime

WEIGHTS = ("lora", "dora")  # kinds that add a matrix to a weight
VECTORS = ("ia3", "bias")
TENSORS = ("bottleneck", "prefix", "prompt")
Q = "model.layers.0.self_attn.q_proj"


def off(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other).norm() / other.norm())


def ties_by_hand(taus: list[Tensor], thresholds: list[float], w: list[float], variant: str) -> Tensor:
    """Entry by entry, as the papers and programs say."""
    kept = [torch.where(t.abs() >= limit, t, 0.0) for t, limit in zip(taus, thresholds, strict=True)]
    out = torch.zeros_like(taus[0])
    for place in np.ndindex(*out.shape):
        entries = [float(t[place]) for t in kept]
        votes = sum(x if variant == "peft" else v * x for x, v in zip(entries, w, strict=True))
        sign = 1 if votes > 0 or (votes == 0 and variant != "paper") else -1 if votes < 0 else 0
        agree = [(v, x) for v, x in zip(w, entries, strict=True) if x * sign > 0]
        if agree:
            share = len(agree) if variant == "peft" else sum(v for v, _ in agree)
            out[place] = sum(v * x for v, x in agree) / share
    return out


def kth(values: Tensor, density: float) -> float:
    flat = values.abs().flatten()
    return float(flat.sort(descending=True).values[max(1, int(density * flat.numel())) - 1])


@pytest.mark.parametrize("variant", ["paper", "peft", "mergekit"])
def test_ties_is_its_definition(lab: Any, variant: str) -> None:
    home = lab(num_key_value_heads=4)
    home.add("lora", "a", "b", "c", target_modules=("attn.q", "attn.v"))
    w = [1.0, 0.5, 2.0]
    home.merge(f"ties(a, b, c, density=0.3, lambda=0.7, weights=[1, 0.5, 2], variant={variant}, rank=32)")
    paths = runtime(home.model).adapters["a"].paths
    for path in paths:
        taus = [home.delta(n, path) for n in "abc"]
        whole = [torch.cat([home.delta(n, p).flatten() for p in paths]) for n in "abc"]
        limits = [kth(t if variant != "paper" else all_, 0.3) for t, all_ in zip(taus, whole, strict=True)]
        assert off(home.delta("merged", path), 0.7 * ties_by_hand(taus, limits, w, variant)) < 1e-5


def test_ties_variant_peft_is_what_peft_computes_on_deltas(lab: Any) -> None:
    from peft.utils import merge_utils

    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    home.merge("ties(a, b, density=0.4, weights=[0.5, 2], variant=peft, rank=32)")
    theirs = merge_utils.ties([home.delta("a"), home.delta("b")], torch.tensor([0.5, 2.0]), density=0.4)
    assert off(home.delta("merged"), theirs) < 1e-5
    home.merge("magnitude_prune(a, b, density=0.4, weights=[0.5, 2], rank=32)")
    theirs = merge_utils.magnitude_prune([home.delta("a"), home.delta("b")], torch.tensor([0.5, 2.0]), density=0.4)
    assert off(home.delta("merged"), theirs) < 1e-5


def test_dare_keeps_a_share_and_rescales_it(lab: Any) -> None:
    home = lab(hidden_size=128, num_attention_heads=8, intermediate_size=64)
    home.add("lora", "a", "b", target_modules=("attn.q",))
    tau = home.delta("a")
    home.merge("dare(a, density=0.25, seed=3, rank=128)")
    found = home.delta("merged")
    kept = found.abs() > 1e-3 * tau.abs()
    assert abs(kept.float().mean() - 0.25) < 0.02  # four standard deviations of 16384 draws are 0.0135
    assert off(found, tau * 4 * kept) < 1e-4
    home.merge("dare(a, density=0.25, seed=3, rescale=none, rank=128)")
    assert off(home.delta("merged"), tau * kept) < 1e-4
    home.merge("dare(a, density=0.25, seed=3, rescale=l1, rank=128)")
    assert math.isclose(float(home.delta("merged").abs().sum()), float(tau.abs().sum()), rel_tol=1e-3)


def test_dare_is_unbiased_and_seeded(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    draws = []
    for seed in range(100):
        home.merge(f"dare(a, b, density=0.5, seed={seed}, rank=32)")
        draws.append(home.delta("merged"))
    mean = torch.stack(draws).mean(0)
    assert off(mean, home.delta("a + b")) < 0.2 < off(draws[0], home.delta("a + b"))
    home.merge("dare(a, b, density=0.5, seed=0, rank=32)")
    assert torch.equal(home.delta("merged"), draws[0])
    assert not torch.equal(draws[0], draws[1])


def test_random_masks_do_not_depend_on_how_the_rows_are_cut(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q", "mlp.up"))
    home.merge("dare_ties(a, b, rank=32)", "whole")
    monkeypatch.setattr(blocks, "_BLOCK", 100)
    home.merge("dare_ties(a, b, rank=32)", "cut")
    assert off(home.delta("cut"), home.delta("whole")) < 1e-5


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_its_formula(lab: Any, t: float) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    home.add("ia3", "i", "j", target_modules=("attn.q",), feedforward_modules=())
    home.merge(f"slerp(a, b, t={t})")
    a, b = home.delta("a"), home.delta("b")
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    wanted = torch.sin((1 - t) * angle) / torch.sin(angle) * a + torch.sin(t * angle) / torch.sin(angle) * b
    assert off(home.delta("merged"), wanted) < 1e-5
    home.merge(f"slerp(i, j, t={t})")
    assert t not in (0.0, 1.0) or home.apart("merged", "j" if t else "i") < 1e-5
    home.merge("slerp(a, a, t=0.5)")  # parallel vectors have no angle
    assert off(home.delta("merged"), a) < 1e-5


def test_knots_is_its_definition(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", target_modules=("attn.q",))
    home.add("lora", "b", size=1, target_modules=("attn.q",))
    deltas = [home.delta("a"), home.delta("b")]
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    rank = 7  # 4 + 3; the other singular values are zero
    parts = [(s[:, None] * v)[:rank] for v in vh.split(32, dim=1)]
    merged = ties_by_hand(parts, [kth(p, 0.4) for p in parts], [1.0, 1.0], "mergekit")
    made = home.merge("knots(a, b, density=0.4)")
    assert off(home.delta("merged"), u[:, :rank] @ merged) < 1e-4
    assert made.adapter.config.r == rank and made.certificate.exact


def test_svd_is_the_best_of_its_rank_and_certifies_what_it_leaves_out(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    made = home.merge("svd(a, b, weights=[1, 0.5], rank=3)")
    for path, loss in made.certificate.sites.items():
        exact = home.delta("a + 0.5 * b", path)
        u, s, vh = torch.linalg.svd(exact)
        assert off(home.delta("merged", path), (u[:, :3] * s[:3]) @ vh[:3]) < 1e-4
        left_out = float((home.delta("merged", path) - exact).square().sum())
        assert math.isclose(loss.discarded, left_out, rel_tol=1e-4)
        assert math.isclose(loss.share, left_out / float(exact.square().sum()), rel_tol=1e-4)
    assert 0 < made.certificate.share <= made.certificate.worst[1] < 1
    assert made.certificate.as_dict()["sites"].keys() == made.certificate.sites.keys()


def test_a_truncated_merge_certifies_what_it_leaves_out(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.add("dora", "d", "e")
    for names in ("a, b", "d, e"):
        exact = merge(home.model, f"ties({names}, density=0.5, rank=16)").certificate
        made = home.merge(f"ties({names}, density=0.5, rank=2)")
        assert made.certificate.share > exact.share > 0
        assert str(made.certificate).endswith(made.certificate.worst[0])


def test_lambda_scales_and_weights_weigh(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    for text in ("ties({}, {} density=1, rank=4)", "dare_ties({}, {} density=1, rank=4)"):
        home.merge(text.format("a, b", ""), "one")
        home.merge(text.format("a, b", "lambda=3,"), "three")
        assert off(home.delta("three"), 3 * home.delta("one")) < 1e-4
        home.merge(text.format("a", "weights=[5],"), "mean")  # a weighted mean of one
        assert off(home.delta("mean"), home.delta("a")) < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=3),
    st.floats(0.001, 1),
    st.sampled_from(["normal", "few", "zeros", "huge"]),
    st.integers(0, 10**6),
)
def test_the_kth_magnitude_is_exact(shapes: list[tuple[int, int]], density: float, values: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draw = {
        "normal": lambda s: rng.normal(size=s),
        "few": lambda s: rng.integers(-2, 3, size=s),
        "zeros": lambda s: rng.normal(size=s) * (rng.random(s) < 0.1),
        "huge": lambda s: rng.normal(size=s) * 10.0 ** rng.integers(-30, 30, size=s),
    }[values]
    tensors = [torch.from_numpy(np.asarray(draw(s), dtype=np.float32)) for s in shapes]
    sources = [blocks.TensorSource(t) for t in tensors]
    k = max(1, int(density * blocks.size(sources)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_LIMIT", 20)  # so that brackets have to be halved
        patch.setattr(blocks, "_SAMPLE", 16)
        patch.setattr(blocks, "_BLOCK", 64)
        found = blocks.kth_magnitude(sources, k)
    assert found == float(torch.cat([t.flatten() for t in tensors]).abs().sort(descending=True).values[k - 1])
