"""The backends of the low-rank mixture: they agree with the formula, with each other and in their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.kernels.low_rank import BACKENDS, Pair, choose, expand
from compose.runtime.model_runtime import activate

PER_ROW = sorted(BACKENDS)
PER_TOKEN = ["grouped", "loop", "stacked"]
D_IN, D_OUT = 7, 5


def pairs_of(ranks, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        Pair(
            torch.randn(r, D_IN, generator=generator, dtype=dtype),
            torch.randn(D_OUT, r, generator=generator, dtype=dtype),
            0.5 + i,
        )
        for i, r in enumerate(ranks)
    ]


def formula(pairs, weights, y, x):
    """Row by row, token by token, expert by expert."""
    out = y.clone()
    repeat = len(x) // len(weights)
    for i in range(len(x)):
        for t in range(x.shape[1]):
            w = weights[i // repeat]
            w = w if weights.dim() == 2 else w[t if len(w) > 1 else 0]
            for e, p in enumerate(pairs):
                out[i, t] += w[e] * p.scale * (p.B @ (p.A @ x[i, t]))
    return out


@st.composite
def cases(draw, per_token):
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rows, repeat, length = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = (rows, draw(st.sampled_from([1, length])), len(ranks)) if per_token else (rows, len(ranks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))  # also rows without any
    x = torch.randn(rows * repeat, length, D_IN, generator=generator, dtype=torch.float64)
    y = torch.randn(rows * repeat, length, D_OUT, generator=generator, dtype=torch.float64)
    return pairs_of(ranks, draw(st.integers(0, 9))), weights * kept, y, x


@settings(max_examples=60, deadline=None)
@given(case=cases(per_token=False), name=st.sampled_from(PER_ROW), fresh=st.booleans())
def test_weights_per_row(case, name, fresh):
    pairs, weights, y, x = case
    expected, kept = formula(pairs, weights, y, x), y.clone()
    torch.testing.assert_close(BACKENDS[name](pairs, weights)(y, x, fresh=fresh), expected)
    assert fresh or torch.equal(y, kept), "y belongs to the caller"


@settings(max_examples=60, deadline=None)
@given(case=cases(per_token=True), name=st.sampled_from(PER_TOKEN), fresh=st.booleans())
def test_weights_per_token(case, name, fresh):
    pairs, weights, y, x = case
    expected = formula(pairs, weights, y, x)
    torch.testing.assert_close(BACKENDS[name](pairs, weights)(y, x, fresh=fresh), expected)


@settings(max_examples=40, deadline=None)
@given(case=cases(per_token=False) | cases(per_token=True))
def test_the_chosen_backend_can_do_it(case):
    pairs, weights, y, x = case
    name = choose([p.rank for p in pairs], weights)
    torch.testing.assert_close(BACKENDS[name](pairs, weights)(y, x), formula(pairs, weights, y, x))


@pytest.mark.parametrize("name", PER_ROW)
def test_gradients_agree_with_the_loop(name):
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]], dtype=torch.float64)
    x = torch.randn(4, 3, D_IN, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, D_OUT, generator=generator, dtype=torch.float64)
    found = {}
    for backend in ("loop", name):
        inputs = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        pairs = [Pair(p.A.requires_grad_(), p.B.requires_grad_(), p.scale) for p in pairs_of((2, 1, 3))]
        out = BACKENDS[backend](pairs, weights)(inputs[1], inputs[0])
        leaves = [*inputs, *(t for p in pairs for t in (p.A, p.B))]
        found[backend] = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(found[name], found["loop"])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (n, s)
        for n in ("loop", "stacked", "gather")
        for s in ((2, 3, 2), (2, 2), (1, 2))
        if n != "gather" or len(s) == 2
    ],
)
def test_weights_have_gradients(name, shape):
    weights = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(2, 3, D_IN, dtype=torch.float64), torch.zeros(2, 3, D_OUT, dtype=torch.float64)
    pairs = pairs_of((2, 1))
    assert torch.autograd.gradcheck(lambda w: BACKENDS[name](pairs, w)(y, x), [weights])


@pytest.mark.parametrize("name", PER_ROW)
@pytest.mark.parametrize("batch", [3, 5])
def test_a_batch_that_is_no_multiple_is_refused(name, batch):
    prepared = BACKENDS[name](pairs_of((1, 1)), torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"2 rows and the batch has {batch}"):
        prepared(torch.zeros(batch, 1, D_OUT, dtype=torch.float64), torch.zeros(batch, 1, D_IN, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(set(PER_ROW) - set(PER_TOKEN)))
def test_a_backend_for_rows_refuses_weights_per_token(name):
    with pytest.raises(ValueError, match="per row"):
        BACKENDS[name](pairs_of((1,)), torch.ones(1, 1, 1, dtype=torch.float64))


def test_rows_repeat_as_beams_do():
    rows = torch.tensor([[1.0], [2.0]])
    assert expand(rows, 6).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert expand(rows, 2) is rows


@pytest.mark.parametrize("name", PER_ROW)
def test_half_precision(name):
    pairs = pairs_of((2, 3), dtype=torch.bfloat16)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.25]])
    x, y = torch.randn(2, 4, D_IN).bfloat16(), torch.randn(2, 4, D_OUT).bfloat16()
    exact = [Pair(p.A.float(), p.B.float(), p.scale) for p in pairs]
    got = BACKENDS[name](pairs, weights)(y, x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), formula(exact, weights, y.float(), x.float()), atol=0.2, rtol=0.05)


@pytest.mark.parametrize(
    ("ranks", "weights", "expected"),
    [
        ([8], torch.ones(1, 1), "stacked"),  # one for all rows
        ([8] * 4, torch.ones(1, 4), "stacked"),
        ([8] * 2, torch.eye(2), "stacked"),  # computing two costs less than gathering one
        ([8] * 32, torch.eye(32), "gather"),
        ([64, 8], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "stacked"),
        ([8] * 4, torch.ones(32, 4), "stacked"),  # every row uses every expert anyway
        ([8] * 8, torch.ones(2, 5, 8), "stacked"),
        ([16] * 32, torch.ones(2, 5, 32), "stacked"),  # every token uses every expert anyway
        ([16] * 4, torch.eye(4)[None], "stacked"),
        ([16] * 32, torch.eye(32)[None], "grouped"),
    ],
)
def test_choice(ranks, weights, expected):
    assert choose(ranks, weights) == expected


def test_a_zero_row_is_left_as_it_is_bit_for_bit():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    pairs = pairs_of((2, 2), dtype=torch.float32)
    x, y = torch.randn(2, 3, D_IN), torch.randn(2, 3, D_OUT)
    for name in PER_ROW:
        out = BACKENDS[name](pairs, weights)(y.clone(), x)
        assert torch.equal(out[0], y[0]), name
        assert not torch.equal(out[1], y[1]), name


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "dense", "sparse", "krona", "ladder"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "frozen"])
def test_an_adapter_that_diverged_does_not_reach_other_rows(tiny, kind, live):
    """NaN in one adapter of a mixed batch: the other rows keep their outputs and, while training, their gradients."""
    model = tiny.model("llama")
    good, bad = (tiny.adapter(model, kind, name, seed=i) for i, name in enumerate(("good", "bad")))
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.fill_(torch.nan)
    if not live:
        good.freeze()
        bad.freeze()
    batch = tiny.batch("llama", tiny.rows(5, 4, 3))
    activate(model, ["good", "good", "good"])
    expected = tiny.logits(model, batch)
    activate(model, ["good", "bad", "good"])
    ours = model(**batch).logits
    assert ours[1].isnan().all()
    for i in (0, 2):
        n = int(batch["attention_mask"][i].sum())
        torch.testing.assert_close(ours[i, :n].detach(), expected[i], atol=1e-5, rtol=1e-5)
    if live:
        ours[0].square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in good.parameters())
