"""Experts weighed at each site by a gate that reads the site's input: the seam that routing per token stands on."""

from __future__ import annotations

import pytest
import torch

import compose
from compose.errors import KindError
from compose.kernels.low_rank import BACKENDS, Pair, Routed

EXPERTS = ["a", "b", "c"]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def constant(*weights):
    """A gate that gives every token of every site the same weights."""
    return lambda path, x: torch.tensor([[weights]])


def by_sign(experts):
    """A gate that gives each token one expert, by what enters the site."""
    return lambda path, x: torch.nn.functional.one_hot(x[..., :experts].argmax(-1), experts).float()


@pytest.mark.parametrize("experts", [3, 60], ids=["stacked", "grouped"])
@pytest.mark.parametrize("active", [1, 2])
def test_routed_factors_agree_with_the_reference_backend(experts, active):
    generator = torch.Generator().manual_seed(experts)
    pairs = [
        Pair(torch.randn(6 + e % 3, 16, generator=generator), torch.randn(12, 6 + e % 3, generator=generator), 0.5 + e)
        for e in range(experts)
    ]
    x, y = torch.randn(3, 5, 16, generator=generator), torch.randn(3, 5, 12, generator=generator)
    chosen = torch.rand(3, 5, experts, generator=generator).topk(active, -1).indices
    weights = torch.zeros(3, 5, experts).scatter(-1, chosen, torch.rand(3, 5, active, generator=generator))
    wanted = BACKENDS["loop"](pairs, weights)(y, x)
    routed = Routed(pairs)
    assert torch.allclose(routed(y, x, weights), wanted, rtol=1e-4, atol=1e-3)
    assert torch.allclose(routed(y.clone(), x, weights, fresh=True), wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(routed(y, x, torch.zeros(1, 1, experts)), y)


def test_one_hot_is_the_single_expert_and_zero_is_the_base(model, texts):
    for place, name in enumerate(EXPERTS):
        compose.route(model, EXPERTS, constant(*(float(i == place) for i in range(3))))
        routed = logits(model, texts)
        compose.activate(model, name)
        assert torch.allclose(routed, logits(model, texts), atol=2e-5)
    compose.route(model, EXPERTS, constant(0.0, 0.0, 0.0))
    routed = logits(model, texts)
    compose.activate(model, None)
    assert torch.equal(routed, logits(model, texts))


def test_constant_weights_are_the_weighted_sum_of_mixed_kinds(model, texts):
    compose.route(model, EXPERTS, constant(0.25, 0.5, 0.75))
    routed = logits(model, texts)
    compose.activate(model, "0.25 * a + 0.5 * b + 0.75 * c")
    assert torch.allclose(routed, logits(model, texts), atol=5e-5)


def test_experts_may_be_expressions_and_nothing(model, texts):
    compose.route(model, ["a + b", None, "c >> a"], constant(0.5, 3.0, 0.5))
    routed = logits(model, texts)
    compose.activate(model, "0.5 * (a + b) + 0.5 * (c >> a)")
    assert torch.allclose(routed, logits(model, texts), atol=5e-5)


def test_a_batch_is_each_row_alone_and_cached_is_uncached(model, texts):
    compose.route(model, EXPERTS, by_sign(3))
    together = logits(model, texts)
    for row in range(len(texts)):
        assert torch.allclose(together[row], logits(model, texts[row : row + 1])[0], atol=2e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(texts[:, :8], **options)
    assert torch.equal(cached, model.generate(texts[:, :8], use_cache=False, **options))


def test_order_of_experts_and_an_unused_one_change_nothing(model, texts):
    gate = by_sign(2)
    compose.route(model, ["a", "b"], gate)
    first = logits(model, texts)
    compose.route(model, ["b", "a"], lambda path, x: gate(path, x).flip(-1))
    assert torch.allclose(first, logits(model, texts), atol=2e-5)
    compose.route(model, ["a", "b", "c"], lambda path, x: torch.nn.functional.pad(gate(path, x), (0, 1)))
    assert torch.allclose(first, logits(model, texts), atol=2e-5)
    unused = compose.create(model, "lora", {"r": 3, "target_modules": "all-linear"}, name="d", seed=9)
    for parameter in unused.parameters():
        parameter.data.fill_(1.0)
    unused.freeze()
    compose.route(model, ["a", "b", "d"], lambda path, x: torch.nn.functional.pad(gate(path, x), (0, 1)))
    assert torch.equal(first, logits(model, texts)), "a weight of zero changes no bit"


def test_gradients_reach_the_gate(model, texts):
    score = torch.zeros(3, requires_grad=True)
    compose.route(model, EXPERTS, lambda path, x: score.softmax(-1)[None, None])
    model(input_ids=texts, labels=texts).loss.backward()
    assert bool((score.grad != 0).all())
    assert all(p.grad is None for p in model.parameters())


def test_what_no_gate_can_weigh_is_refused_and_nothing_changes(model, texts):
    compose.create(model, "prefix", {"num_virtual_tokens": 2}, name="p").freeze()
    compose.activate(model, "a")
    before = logits(model, texts)
    with pytest.raises(KindError, match="prefix adapter 'p'"):
        compose.route(model, ["a", "p"], constant(0.5, 0.5))
    with pytest.raises(KindError, match="rows"):
        compose.route(model, [], constant())
    assert torch.equal(before, logits(model, texts))
    compose.route(model, ["a", "b"], constant(1.0, 0.0, 0.0))
    with pytest.raises(KindError, match="2 experts"):
        logits(model, texts)
    compose.activate(model, "a")
    assert torch.equal(before, logits(model, texts))


def test_eject_leaves_the_base(model, texts):
    compose.activate(model, None)
    bare = logits(model, texts)
    compose.route(model, EXPERTS, by_sign(3))
    compose.eject(model)
    assert torch.equal(bare, logits(model, texts))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "nf4"), ("llama", "bf16"), ("bert", "fp32"), ("gpt2", "fp32"), ("opt", "fp32"), ("t5", "fp32")],
)
def test_every_family_and_precision(tiny, family, dtype):
    """Constant weights are the weighted sum, and a gate that reads its input does not see the other rows."""
    made = tiny.model(family, dtype)
    for seed, kind in enumerate(("lora", "lora", "ia3")):
        tiny.adapter(made, kind, "abc"[seed], seed=seed, noise=0.1).freeze()
    batch = tiny.batch(family, tiny.rows(6, 6))
    close = 0.08 if dtype == "bf16" else 2e-4
    compose.route(made, EXPERTS, constant(0.5, 0.25, 0.75))
    routed = tiny.logits(made, batch)
    compose.activate(made, "0.5 * a + 0.25 * b + 0.75 * c")
    for row, wanted in zip(routed, tiny.logits(made, batch), strict=True):
        assert torch.allclose(row, wanted, atol=close * float(wanted.abs().max()))
    compose.route(made, EXPERTS, by_sign(3))
    together = tiny.logits(made, batch)
    alone = tiny.logits(made, {name: value[:1] for name, value in batch.items()})
    if dtype != "bf16":  # where rounding may turn an argmax
        assert torch.allclose(together[0], alone[0], atol=close * float(alone[0].abs().max()))
