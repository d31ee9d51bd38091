"""Merging in parameter space: the laws, the methods against their definitions, the peers' mistakes, and the errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compose
from compose.expr import Call, Ref, parse
from compose.fold import fold
from compose.function import functions
from compose.inject import runtime
from compose.kind import KindError, kinds
from compose.merge import lower_to_lora, merge, methods
from compose.merges import lorahub
from compose.parameter_space import blocks
from compose.parameter_space.effect import effect_of
from compose.weights import dense_weight

WEIGHTS = ("lora", "dora")  # kinds that add a matrix to a weight
VECTORS = ("ia3", "bias")
TENSORS = ("bottleneck", "prefix", "prompt")
MERGES = sorted(n for n, spec in functions().items() if spec.family == "merge")
Q = "model.layers.0.self_attn.q_proj"


class Lab:
    """A tiny model, adapters on it, and how far two compositions are apart."""

    def __init__(self, tiny: Any, family: str = "llama", dtype: str = "fp32", **config: Any) -> None:
        self.tiny, self.family = tiny, family
        self.model = tiny.model(family, dtype, **config)
        self.batch = tiny.batch(family, tiny.rows(7, 5))

    def add(self, kind: str, *names: str, size: int = 0, **options: Any) -> None:
        for name in names:
            seed = sum(map(ord, name))
            self.tiny.adapter(self.model, kind, name, seed=seed, size=size, **options).freeze()

    def logits(self, expr: Any) -> Tensor:
        compose.activate(self.model, expr)
        return torch.cat(self.tiny.logits(self.model, self.batch))

    def apart(self, one: Any, other: Any) -> float:
        """Distance of the outputs relative to what ``other`` changes."""
        a, b, base = self.logits(one), self.logits(other), self.logits(None)
        return float((a - b).norm() / (b - base).norm())

    def merge(self, expr: str, name: str = "merged") -> Any:
        made = merge(self.model, expr, name=name)
        compose.attach(self.model, name, made.adapter)
        return made

    def delta(self, expr: str, path: str = Q) -> Tensor:
        """D of an expression over resident adapters at one site, dense."""
        return effect_of(runtime(self.model), path, parse(expr)).dense()


@pytest.fixture
def lab(tiny: Any) -> Callable[..., Lab]:
    return lambda *args, **config: Lab(tiny, *args, **config)


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# -- laws ----------------------------------------------------------------------------------------------------------

# Each merge of one adapter that gives that adapter back.
UNITS = (
    "average(a)",
    "task_arithmetic(a)",
    "cat(a)",
    "ties(a, density=1)",
    "ties(a, density=1, variant=peft)",
    "ties(a, density=1, variant=mergekit)",
    "dare(a, density=1)",
    "dare_ties(a, density=1)",
    "magnitude_prune(a, density=1)",
    "slerp(a, b, t=0)",
    "slerp(b, a, t=1)",
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", [*WEIGHTS, *VECTORS, *TENSORS])
def test_merges_of_one_adapter_are_that_adapter(lab: Any, kind: str, family: str) -> None:
    home = lab(family)
    home.add(kind, "a", "b")
    for text in UNITS:
        home.merge(text)
        assert home.apart("merged", "a") < 1e-5, text
        assert runtime(home.model).adapters["merged"].kind == kind


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_kind_averages_or_says_why_not(lab: Any, kind: str) -> None:
    home = lab()
    home.add(kind, "a")
    try:
        home.merge("average(a)")
    except KindError as error:
        assert kind in str(error) and "average(a)" in str(error)
        assert kind not in (*WEIGHTS, *VECTORS, *TENSORS)
    else:
        assert home.apart("merged", "a") < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", [*WEIGHTS, *VECTORS, *TENSORS])
def test_cat_is_the_sum(lab: Any, kind: str, family: str) -> None:
    home = lab(family)
    home.add(kind, "a")
    home.add(kind, "b", size=1)  # another rank, length or width
    made = home.merge("cat(a, b)")
    assert home.apart("merged", "a + b") < 1e-5
    assert made.certificate.exact and made.adapter.kind == kind


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_merges_are_weighted_sums(lab: Any, family: str) -> None:
    home = lab(family)
    home.add("lora", "a", use_rslora=True)
    home.add("lora", "b", size=1, target_modules="all-linear")
    home.add("dora", "d")
    for text, same in {
        "svd(a, b)": "a + b",
        "svd(a, b, weights=[0.3, -2])": "0.3 * a - 2 * b",
        "cat(a, b, weights=[0.3, -2])": "0.3 * a - 2 * b",
        "task_arithmetic(a, b, lambda=0.4)": "0.4 * a + 0.4 * b",
        "average(a, b, weights=[1, 3])": "0.25 * a + 0.75 * b",
        "dare(a, b, density=1, rank=7)": "a + b",
        "magnitude_prune(a, b, density=1, weights=[1, 2], rank=7)": "a + 2 * b",
        'knots(a, b, by="linear", weights=[2, 0.5])': "2 * a + 0.5 * b",
        'knots(a, b, by="dare", density=1)': "a + b",
        "cat(a, d)": "a + d",  # a LoRA and a DoRA add up to a DoRA
        "average(d, a)": "0.5 * a + 0.5 * d",
        "0.5 * a - d": "0.5 * a - d",
    }.items():
        home.merge(text)
        assert home.apart("merged", same) < 1e-5, text


def test_an_average_needs_no_new_adapter_where_effects_are_linear(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.add("bottleneck", "c", "d")
    compose.activate(home.model, "average(a, b) >> cat(c, d)")
    assert set(runtime(home.model).adapters) == set("abcd")
    compose.activate(home.model, "average(c, d)")
    assert set(runtime(home.model).adapters) == {*"abcd", "average(c, d)"}


def test_lora_and_output_gains_merge_into_one_dora_without_biases(lab: Any) -> None:
    home = lab()
    home.add("lora", "a")
    home.add("ia3", "i", target_modules=("attn.q", "attn.v"), feedforward_modules=())
    assert home.merge("a + i").adapter.kind == "dora"
    assert home.apart("merged", "a + i") < 1e-5


@pytest.mark.parametrize("text", ["ties({}, rank=4)", "dare_ties({}, rank=4)", "dare({})", "svd({})", "average({})"])
def test_the_order_of_adapters_does_not_matter(lab: Any, text: str) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    home.merge(text.format("a, b, c"), "one")
    home.merge(text.format("c, a, b"), "two")
    # The masks are seeded by content; what is left is the order of float sums, and the basis of a truncated SVD.
    assert off(home.delta("one"), home.delta("two")) < 1e-4
    assert parse(text.format("a, b, c")).digest == parse(text.format("c, a, b")).digest


def test_members_may_act_at_different_sites(lab: Any) -> None:
    home = lab()
    home.add("ia3", "a", target_modules=("attn.k",))
    home.add("ia3", "b", target_modules=("mlp.down", "attn.v"))
    home.add("bias", "c", target_modules=("attn.q",))
    home.add("bias", "d", target_modules=("attn.q", "mlp.up"))
    for one, two in ("ab", "cd"):
        home.merge(f"cat({one}, {two}, weights=[2, 0.5])")
        assert home.apart("merged", f"2 * {one} + 0.5 * {two}") < 1e-5
        home.merge(f"ties({one}, {two}, density=1)")
        assert home.apart("merged", one) > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merges_on_a_quantized_base(lab: Any, family: str) -> None:
    home = lab(family, "nf4")
    home.add("lora", "a")
    home.add("dora", "d")
    home.merge("cat(a, d, weights=[0.5, 1])")
    assert home.apart("merged", "0.5 * a + d") < 1e-4
    home.merge("ties(d, density=1)")
    assert home.apart("merged", "d") < 1e-4


def test_merged_adapters_are_saved_and_read_back(lab: Any, tmp_path: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.merge("ties(a, b, density=0.5)")
    compose.save(runtime(home.model).adapters["merged"], tmp_path / "m", model=home.model)
    compose.attach(home.model, "again", tmp_path / "m")
    assert torch.equal(home.logits("again"), home.logits("merged"))


# -- methods against their definitions -----------------------------------------------------------------------------


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
    assert off(home.delta("cut"), home.delta("whole")) < 1e-6


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


# -- the peers' mistakes -------------------------------------------------------------------------------------------


def peft_pair(home: Lab, tmp_path: Any, **options: Any) -> Any:
    """A PEFT model with LoRAs "a" and "b", the same two attached here, and PEFT's D at the q of layer 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(home.model), config, adapter_name="a")
    theirs.add_adapter("b", config)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    for name in "ab":
        compose.attach(home.model, name, tmp_path / name)
    layer = theirs.get_submodule(f"base_model.model.{Q}")
    return theirs, layer.get_delta_weight


@pytest.mark.parametrize(
    ("peft_way", "ours"),
    [
        ({"combination_type": "linear"}, "task_arithmetic(a, b, weights=[0.7, 0.6])"),
        (
            {"combination_type": "ties", "density": 1.0},
            "ties(a, b, weights=[.7, .6], variant=peft, density=1, rank=32)",
        ),
        ({"combination_type": "dare_linear", "density": 1.0}, "dare(a, b, weights=[0.7, 0.6], density=1, rank=32)"),
    ],
    ids=["linear", "ties", "dare"],
)
def test_peft_merges_factors_apart_and_mixes_adapters(lab: Any, tmp_path: Any, peft_way: Any, ours: str) -> None:
    from peft.utils import merge_utils

    home = lab(num_key_value_heads=4)
    theirs, delta = peft_pair(home, tmp_path)
    a, b = delta("a").detach(), delta("b").detach()
    right = 0.7 * a + 0.6 * b
    if "ties" in ours:
        right = merge_utils.ties([a, b], torch.tensor([0.7, 0.6]), density=1.0)
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.6], "wrong", **peft_way)
    assert off(delta("wrong"), right) > 0.5  # A_a B_b terms that belong to no adapter
    home.merge(ours)
    assert off(home.delta("merged"), right) < 1e-5


def test_peft_inflates_merges_of_rslora(lab: Any, tmp_path: Any) -> None:
    home = lab()
    theirs, delta = peft_pair(home, tmp_path, use_rslora=True)
    right = 0.7 * delta("a") + 0.6 * delta("b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.6], "wrong", combination_type="cat")
    assert off(delta("wrong"), math.sqrt(8) * right) < 1e-5  # sqrt of the merged rank too large
    for text in ("cat(a, b, weights=[0.7, 0.6])", "svd(a, b, weights=[0.7, 0.6])"):
        home.merge(text)
        assert off(home.delta("merged"), right) < 1e-5


def test_peft_merges_doras_silently_wrong(lab: Any, tmp_path: Any) -> None:
    home = lab()
    theirs, _ = peft_pair(home, tmp_path, use_dora=True)
    for name in "ab":  # magnitudes away from the norms of W, as training leaves them
        layer = theirs.get_submodule(f"base_model.model.{Q}").lora_magnitude_vector[name]
        layer.weight.data *= 1.5
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    for name in "ab":
        compose.attach(home.model, name, tmp_path / name)
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "wrong", combination_type="cat")
    theirs.set_adapter("wrong")
    right = home.logits("0.5 * a + 0.5 * b")
    with torch.no_grad():
        wrong = torch.cat(home.tiny.logits(theirs, home.batch))
    base = home.logits(None)
    assert float((wrong - right).norm() / (right - base).norm()) > 0.3
    for text in ("average(a, b)", "svd(a, b, weights=[0.5, 0.5])"):
        home.merge(text)
        assert home.apart("merged", "0.5 * a + 0.5 * b") < 1e-5


def test_cat_equals_peft_where_peft_is_right(lab: Any, tmp_path: Any) -> None:
    home = lab()
    theirs, delta = peft_pair(home, tmp_path)
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.6], "cat", combination_type="cat")
    home.merge("cat(a, b, weights=[0.7, -0.6])")
    assert off(home.delta("merged"), delta("cat")) < 1e-6


# -- whole modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck"])
def test_heads_are_merged_relative_to_the_base(lab: Any, tiny: Any, kind: str) -> None:
    home = Lab(tiny, "bert")
    home.model = tiny.model("bert", task="classification")
    home.add(kind, "a", "b", modules_to_save=("classifier",))
    base = home.model.get_submodule("classifier").state_dict()
    heads = [runtime(home.model).adapters[n].head("classifier").state_dict() for n in "ab"]
    made = home.merge("task_arithmetic(a, b, weights=[2, -1])")
    for key, value in made.adapter.head("classifier").state_dict().items():
        wanted = base[key] + 2 * (heads[0][key] - base[key]) - (heads[1][key] - base[key])
        assert off(value, wanted) < 1e-5
    home.merge("average(a)")
    assert home.apart("merged", "a") < 1e-5
    home.merge("ties(a, density=1)")
    assert home.apart("merged", "a") < 1e-5


def test_heads_for_different_labels_are_not_merged(lab: Any, tiny: Any) -> None:
    home = Lab(tiny, "bert")
    home.model = tiny.model("bert", task="classification")
    home.add("lora", "a", "b", modules_to_save=("classifier",))
    a, b = (runtime(home.model).adapters[n] for n in "ab")
    a.labels = b.labels = ("no", "maybe", "yes")
    assert merge(home.model, "cat(a, b)").adapter.labels == a.labels
    b.labels = ("yes", "maybe", "no")
    with pytest.raises(KindError, match="different labels"):
        merge(home.model, "cat(a, b)")


# -- one LoRA for mixed kinds, and no adapter at all -----------------------------------------------------------------

MIXED = ("0.5 * a + d", "a >> d", "d >> 0.5 * a", "a >> i", "i + j + a", "0.3 * (a >> i) + d", "average(d, e) >> i")


def mixed(lab: Any, family: str = "llama", dtype: str = "fp32") -> Lab:
    home: Lab = lab(family, dtype, **({"num_key_value_heads": 4} if family == "llama" else {}))
    places = ("attn.q", "attn.v") if family == "llama" else ("attn.qkv",)
    home.add("lora", "a", target_modules=(*places, "mlp.down"))
    home.add("dora", "d", "e", target_modules=places)
    home.add("ia3", "i", target_modules=(*places, "mlp.down"))
    home.add("ia3", "j", target_modules=places)
    return home


@pytest.mark.parametrize("text", MIXED)
def test_mixed_expressions_lower_to_one_lora(lab: Any, text: str) -> None:
    home = mixed(lab)
    made = lower_to_lora(home.model, text, rank=32, name="whole")
    compose.attach(home.model, "whole", made.adapter)
    assert made.adapter.kind == "lora"
    assert home.apart("whole", text) < 1e-4
    small = lower_to_lora(home.model, text, rank=5, name="small")
    compose.attach(home.model, "small", small.adapter)
    for path, loss in small.certificate.sites.items():
        exact, written = home.delta("whole", path), home.delta("small", path)
        best = torch.linalg.svdvals(exact)[5:].double().square().sum()
        left_out = (exact - written).double().square().sum()
        assert math.isclose(loss.discarded, float(left_out), rel_tol=1e-3, abs_tol=1e-8)
        assert float(left_out) < 1.02 * float(best) + 1e-8


def test_a_sum_of_loras_lowers_exactly_without_a_rank(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    made = lower_to_lora(home.model, "a - 0.5 * b")
    compose.attach(home.model, "m", made.adapter)
    assert made.certificate.exact and home.apart("m", "a - 0.5 * b") < 1e-5


@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_no_weight_is_not_lowered_or_folded(lab: Any, kind: str) -> None:
    home = lab()
    home.add("lora", "a")
    home.add(kind, "p")
    before = [name for name, _ in home.model.named_modules()]
    for act in (lambda: lower_to_lora(home.model, "a + p", rank=4), lambda: list(fold(home.model, "a + p"))):
        with pytest.raises(KindError, match=f"{kind} .*'p'"):
            act()
    assert [name for name, _ in home.model.named_modules()] == before


def test_the_lowered_lora_loads_in_peft(lab: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    home = mixed(lab)
    made = lower_to_lora(home.model, "a >> d", rank=8)
    compose.attach(home.model, "m", made.adapter)
    compose.save(made.adapter, tmp_path / "m", model=home.model)
    wanted = home.logits("m")
    compose.eject(home.model)
    theirs = PeftModel.from_pretrained(home.model, tmp_path / "m")
    with torch.no_grad():
        assert off(torch.cat(home.tiny.logits(theirs, home.batch)), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("text", ["a", "d", "i", "0.5 * a + d >> i", "ties(d, e, density=0.5, rank=4) + i"])
def test_merged_weights_are_the_active_adapter(lab: Any, family: str, text: str) -> None:
    home = mixed(lab, family)
    folded = {f.name: f for f in fold(home.model, text)}
    wanted = home.logits(text)
    compose.eject(home.model)
    state = home.model.state_dict()
    assert folded.keys() <= state.keys()
    home.model.load_state_dict({**state, **{name: f.value for name, f in folded.items()}})
    with torch.no_grad():
        got = torch.cat(home.tiny.logits(home.model, home.batch))
    assert off(got, wanted) < 1e-5
    assert all(f.rounding < 1e-4 for f in folded.values())


def test_folding_a_merge_needs_no_rank(lab: Any, tiny: Any) -> None:
    home = Lab(tiny, "bert")
    home.model = tiny.model("bert", task="classification")
    home.add("lora", "a", "b", target_modules=("attn.q",), modules_to_save=("classifier",))
    folded = {f.name: f.value for f in fold(home.model, "ties(a, b, density=0.5)")}
    home.merge("ties(a, b, density=0.5, rank=32)")  # all the rank there is
    wanted = home.logits("merged")
    home.merge("ties(a, b, density=0.5)", "small")
    assert home.apart("small", "merged") > 0.05
    compose.eject(home.model)
    home.model.load_state_dict({**home.model.state_dict(), **folded})
    with torch.no_grad():
        assert off(torch.cat(home.tiny.logits(home.model, home.batch)), wanted) < 1e-5


def test_biases_and_heads_fold_too(lab: Any, tiny: Any) -> None:
    home = Lab(tiny, "bert")
    home.model = tiny.model("bert", task="classification")
    home.add("bias", "a", modules_to_save=("classifier",))
    folded = {f.name: f.value for f in fold(home.model, "a")}
    wanted = home.logits("a")
    compose.eject(home.model)
    home.model.load_state_dict({**home.model.state_dict(), **folded})
    with torch.no_grad():
        assert off(torch.cat(home.tiny.logits(home.model, home.batch)), wanted) < 1e-5


def test_folding_into_bfloat16_reports_what_rounding_loses(lab: Any) -> None:
    home = lab("llama", "bf16")
    home.add("lora", "a", noise=0.01)
    assert max(f.rounding for f in fold(home.model, "a")) > 0.05
    assert max(f.rounding for f in fold(home.model, "a", dtype=torch.float32)) < 1e-3


def test_folding_a_quantized_base_gives_its_dequantized_weight_changed(lab: Any) -> None:
    home = lab("llama", "nf4")
    home.add("lora", "a", target_modules=("attn.q",))
    found = next(f for f in fold(home.model, "a") if f.name == f"{Q}.weight")
    layer = home.model.get_submodule(Q).base_layer
    assert off(found.value, dense_weight(layer).float() + home.delta("a")) < 1e-6


# -- inside a model ------------------------------------------------------------------------------------------------


def test_a_merge_in_an_expression_is_made_once_and_anew_when_a_member_changes(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    text = "ties(a, b, density=0.5)"
    home.merge(text)
    assert home.apart(f"0.5 * {text} + c", "0.5 * merged + c") < 1e-5
    made = runtime(home.model).adapters[text]
    home.logits([text, None])
    assert runtime(home.model).adapters[text] is made
    with torch.no_grad():
        runtime(home.model).adapters["a"].at(Q, "A").mul_(2)
    home.logits(text)
    assert runtime(home.model).adapters[text] is not made


def test_rows_of_a_batch_may_hold_different_merges(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    rows = ["dare(a, b)", "ties(a, b)"]
    together = home.logits(rows)
    alone = [home.tiny.logits(home.model, home.batch) for e in rows if compose.activate(home.model, e) is None]
    assert off(together[:7], alone[0][0]) < 1e-5 and off(together[7:], alone[1][1]) < 1e-5


def test_nested_merges_leave_nothing_behind(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    home.merge("ties(dare(a, b), cat(b, c), density=1)")
    assert set(runtime(home.model).adapters) == {*"abc", "merged"}


def test_eject_restores_the_base_after_merges(lab: Any) -> None:
    home = lab()
    before = {k: v.clone() for k, v in home.model.state_dict().items()}
    home.add("dora", "a", "b")
    home.merge("ties(a, b)")
    home.logits("ties(a, b) + merged")
    compose.eject(home.model)
    after = home.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_progress_is_reported(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    seen: list[tuple[str, int, int]] = []
    merge(home.model, "ties(a, b)", progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == [1, 2, 3, 4] and {total for *_, total in seen} == {4}


# -- LoraHub -------------------------------------------------------------------------------------------------------


def test_lorahub_finds_the_weights_that_made_a_target(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    target = home.logits("lorahub(a, b, weights=[1, -0.5])")

    def score(model: Any) -> float:
        return float((torch.cat(home.tiny.logits(model, home.batch)) - target).square().mean())

    home.logits("a")
    active = runtime(home.model).rows
    found = lorahub.search(home.model, ["a", "b"], score, budget=80, penalty=0.001, seed=1)
    assert runtime(home.model).rows == active
    assert set(runtime(home.model).adapters) == {"a", "b", "lorahub(a, b, weights=[1, -0.5])"}  # no candidate stays
    # w and -w are the same composition in the paper's form
    assert min(np.abs(np.array(found.weights) - s * np.array([1, -0.5])).max() for s in (1, -1)) < 0.2
    assert found.score == found.history[-1] < found.history[0] and len(found.history) <= 80
    assert found == lorahub.search(home.model, ["a", "b"], score, budget=80, penalty=0.001, seed=1)
    assert home.apart(found.expr, "lorahub(a, b, weights=[1, -0.5])") < 0.3


def test_lorahub_sums_factors_as_the_paper_or_deltas_exactly(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    a, b = (runtime(home.model).adapters[n] for n in "ab")
    scale = a.config.scale
    home.merge("lorahub(a, b, weights=[0.5, -1])")
    wanted = scale * (0.5 * a.at(Q, "B") - b.at(Q, "B")) @ (0.5 * a.at(Q, "A") - b.at(Q, "A"))
    assert off(home.delta("merged"), wanted.detach()) < 1e-5
    home.merge("lorahub(a, b, weights=[0.5, -1], variant=exact)")
    assert off(home.delta("merged"), home.delta("0.5 * a - b")) < 1e-5
    home.merge("lorahub(a, weights=[3])")
    assert off(home.delta("merged"), 9 * home.delta("a")) < 1e-5  # a single module scales as w^2, as the paper's does


def test_lorahub_refuses_what_it_cannot_search(lab: Any) -> None:
    home = lab()
    home.add("lora", "a")
    home.add("lora", "b", size=1)
    with pytest.raises(KindError, match="no weights yet"):
        compose.activate(home.model, "lorahub(a, b)")
    with pytest.raises(KindError, match=r"ranks \[3, 4\]"):
        merge(home.model, "lorahub(a, b, weights=[1, 1])")
    with pytest.raises(KindError, match="is nan"):
        lorahub.search(home.model, ["a"], lambda model: math.nan)
    assert set(runtime(home.model).adapters) == {"a", "b"}


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(p, q)", "different configs"),
        ("ties(a, p)", "no parameters in common"),
        ("average(0.5 * p, p)", "no single adapter"),
        ("knots(i)", "works on low-rank deltas"),
        ("svd(i, rank=3)", "a rank is for low-rank deltas"),
        ("knots(a, d)", r"d changes model.* by more than a pair"),
        ("ties(a, c)", "moves the bias"),
        ("ties(a >> i, a)", "full rank"),
        ("svd(a, p)", "no parameters in common"),
        ("cat(2 * p, q)", "there or not"),
        ("cat(p >> q)", "one adapter after the other"),
        ("identity", "no adapter in it"),
        ("ensemble.mean(a, b)", "cannot be activated"),
        ("cat(a, b, b, b, b, b)", "has only 16 dimensions"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(lab: Any, text: str, message: str) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.add("dora", "d")
    home.add("ia3", "i", target_modules=("mlp.down",))
    home.add("bias", "c", target_modules=("attn.q",))
    home.add("prefix", "p")
    home.add("prefix", "q", size=1)
    before = home.logits("a")
    with pytest.raises(KindError, match=message):
        merge(home.model, text)
    assert torch.equal(torch.cat(home.tiny.logits(home.model, home.batch)), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(a, b, weights=[1])", "2 adapters and 1 weights"),
        ("ties(a, b, weights=[1, -1])", "are positive"),
        ("ties(a, b, density=0)", "greater than 0"),
        ("dare(a, b, density=1.5)", "less than or equal to 1"),
        ("ties(a, b, variant=pape)", "'paper', 'peft' or 'mergekit'"),
        ("slerp(a, b, c)", "takes 2 adapters, not 3"),
        ("svd(a, b, rank=0)", "greater than or equal to 1"),
        ("knots(a, b, by=ties, weights=[1, -1])", "are positive"),
        ("ties(a, b, lamda=1)", "did you mean lambda"),
        ("dare(a, seed=-1)", "greater than or equal to 0"),
    ],
)
def test_options_are_checked_where_they_stand(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse(text)


def test_a_weight_inside_a_merge_is_refused(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    compose.activate(home.model, "average(a, b)", weights={"a": 0.5})  # a weighted sum: it means something
    with pytest.raises(KindError, match="stands inside ties"):
        compose.activate(home.model, "ties(a, b)", weights={"a": 0.5})


def test_unknown_names_are_named(lab: Any) -> None:
    home = lab()
    home.add("lora", "alpha")
    for act in (merge, lower_to_lora, lambda m, e: list(fold(m, e))):
        with pytest.raises(Exception, match="did you mean alpha"):
            act(home.model, "ties(alpha, alpah)")


def test_gains_that_cancel_are_refused(lab: Any) -> None:
    home = lab()
    home.add("dora", "d", target_modules=("attn.q",))
    adapter = runtime(home.model).adapters["d"]
    with torch.no_grad():
        adapter.at(Q, "magnitude")[3] = 0
    with pytest.raises(KindError, match="zero in 1 rows"):
        merge(home.model, "average(d)")


def test_every_merge_is_declared_and_carried_out() -> None:
    assert set(methods()) == set(MERGES)
    for name, method in methods().items():
        assert method.paper.startswith(("arXiv:", "doi:")) and method.name == name
        assert Call(name, [Ref("a"), Ref("b")]).digest == Call(name, [Ref("a"), Ref("b")]).digest


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abde"), st.floats(-2, 2).map(lambda w: round(w, 3))), min_size=1, max_size=6)
)
def test_any_weighted_sum_is_one_adapter(tiny: Any, terms: list[tuple[str, float]]) -> None:
    home = Lab(tiny, num_key_value_heads=4)
    home.add("lora", "a", use_rslora=True)
    home.add("lora", "b", size=1, target_modules="all-linear")
    home.add("dora", "d", "e", noise=0.1)
    text = " + ".join(f"{w} * {name}" for name, w in terms)
    made = home.merge(text)
    a, b, base = home.logits("merged"), home.logits(text), home.logits(None)
    assert float((a - b).norm()) < 1e-4 * float((b - base).norm()) + 1e-4 * float(base.norm())
    assert made.certificate.exact
