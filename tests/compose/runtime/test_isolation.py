"""An adapter that has diverged (NaN, or numbers that overflow) stays in its own rows and tokens, gradients included."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.low_rank import Pair, Routed, mix
from compose.runtime.model_runtime import activate, route, runtime

NAN, HUGE = float("nan"), 1e30
MIXED = ("lora", "ia3", "bottleneck", "dense", "ladder")


def spoiled(tiny, model, kind, value=NAN, **options):
    bad = tiny.adapter(model, kind, "bad", seed=3, **options)
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.fill_(value)
    return bad


def finite_gradients(adapter):
    grads = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert grads
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("value", [NAN, HUGE])
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("rows", [["good", "bad", None], ["good", "other >> (bad + other)", "0.5 * (good >> good)"]])
@pytest.mark.parametrize("taught", ["lora", "ia3"])
def test_rows_of_sums_and_sequences(tiny, close, taught, kind, value, rows):
    model = tiny.model("llama")
    good = tiny.adapter(model, taught, "good", **({"lora_dropout": 0.1} if taught == "lora" else {}))
    tiny.adapter(model, "ia3", "other", seed=2)
    spoiled(tiny, model, kind, value)
    batch = tiny.batch("llama", tiny.rows(5, 5, 5))
    activate(model, [rows[0], None, rows[2]])
    alone = tiny.logits(model, batch)
    activate(model, rows)
    ours = tiny.logits(model, batch)
    close([ours[0], ours[2]], [alone[0], alone[2]])
    for train in (False, True):  # with dropout, which is another way through the low-rank pairs
        model.train(train)
        model(**batch).logits[[0, 2]].square().sum().backward()
        finite_gradients(good)


class Gate:
    """Row 0 goes to the first expert, row 1 to the second; what they learn is known for each."""

    def __init__(self, experts, batch, length):
        self.weights = torch.zeros(batch, length, experts)
        self.weights[0, :, 0], self.weights[1, :, 1] = 1.0, 1.0
        self.weights.requires_grad_()

    def __call__(self, path, x):
        return self.weights


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "dense", "krona"])
def test_rows_that_a_gate_tells_apart(tiny, close, kind):
    model = tiny.model("llama")
    good = tiny.adapter(model, kind, "good")
    good.freeze()
    tiny.adapter(model, "lora", "learns", target_modules="all-linear")
    spoiled(tiny, model, kind).freeze()
    batch = tiny.batch("llama", tiny.rows(5, 5))
    activate(model, ["good", None])
    alone = tiny.logits(model, batch)
    for experts in (["good", "bad"], ["good + 0 * learns", "learns >> bad"]):
        gate = Gate(2, 2, 5)
        route(model, experts, gate)
        close(tiny.logits(model, batch)[:1], alone[:1])
        model(**batch).logits[0].square().sum().backward()
        assert gate.weights.grad[0, :, 0].abs().sum() > 0
        assert gate.weights.grad[0].isfinite().all()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "dense"])
def test_weights_by_name(tiny, close, kind, learned):
    """Per row and per token, numbers and learned ones: a weight of zero learns nothing from what is no number."""
    model = tiny.model("llama")
    tiny.adapter(model, kind, "good").freeze()
    spoiled(tiny, model, kind).freeze()
    batch = tiny.batch("llama", tiny.rows(4, 4))
    activate(model, ["good", None])
    alone = tiny.logits(model, batch)
    for shape in ((2,), (2, 4)):
        good, bad = torch.zeros(shape), torch.zeros(shape)
        good[0], bad[1] = 1.0, 1.0
        good.requires_grad_(learned), bad.requires_grad_(learned)
        activate(model, "good + bad", weights={"good": good, "bad": bad})
        close(tiny.logits(model, batch)[:1], alone[:1])
        if learned:
            model(**batch).logits[0].square().sum().backward()
            assert good.grad[0].abs().sum() > 0
            assert good.grad[0].isfinite().all()
            assert bad.grad[0].isfinite().all()


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bottleneck", "dense"])
def test_tokens_at_one_site(tiny, kind):
    """Attention mixes the tokens of a row; at a site each is for itself."""
    model = tiny.model("llama")
    tiny.adapter(model, kind, "good", target_modules=("mlp.down",), layers=(0,)).freeze()
    spoiled(tiny, model, kind, target_modules=("mlp.down",), layers=(0,)).freeze()
    good, bad = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.0, 1.0, 0.0]])
    slot, x = runtime(model).slot("model.layers.0.mlp.down_proj"), torch.randn(1, 3, 48, requires_grad=True)
    runtime(model).context.batch = 1
    activate(model, "good", weights={"good": good})
    alone = slot(x)
    activate(model, "good + bad", weights={"good": good, "bad": bad})
    ours = slot(x)
    kept = [0, 2]
    torch.testing.assert_close(ours[:, kept], alone[:, kept])
    assert ours[:, 1].isnan().any()
    ours[:, kept].square().sum().backward()
    assert x.grad[:, kept].isfinite().all()


@pytest.mark.parametrize("tokens", [3, 600])
def test_routed_pairs(tokens):
    torch.manual_seed(0)
    pairs = [Pair(torch.randn(4, 16), torch.randn(16, 4), 1.0) for _ in range(6)]
    bad = [*pairs[:-1], Pair(torch.full((4, 16), NAN), torch.full((16, 4), NAN), 1.0)]
    x, y, w = torch.randn(2, tokens, 16), torch.randn(2, tokens, 16), torch.zeros(2, tokens, 6)
    w[..., 0], w[..., 2] = 0.5, 0.5
    w[1, 1], w[1, 1, 5] = 0.0, 1.0
    w.requires_grad_()
    expected, ours = Routed(pairs)(y, x, w), Routed(bad)(y, x, w)
    apart = torch.ones(2, tokens, dtype=torch.bool)
    apart[1, 1] = False
    torch.testing.assert_close(ours[apart], expected[apart])
    assert ours[1, 1].isnan().all()
    ours[apart].sum().backward()
    assert w.grad[apart].isfinite().all()


def test_vectors_are_mixed_with_gradients():
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    mixed = mix(w, torch.tensor([[1.0, 2.0], [NAN, 1.0]]))
    assert mixed[0].tolist() == [1.0, 2.0]
    mixed[0].sum().backward()
    assert w.grad[0].isfinite().all()
