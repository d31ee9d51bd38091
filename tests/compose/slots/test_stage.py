"""Every way to compute the low-rank mixture gives the same numbers and the same gradients; weights broadcast."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.atoms import Atoms, Function, Replace
from compose.kernels.coefficients import multiply
from compose.kernels.low_rank import BACKENDS, Pair, choose
from compose.kernels.maps import Dense, Sparse
from compose.slots.branches import Chain, Mix, weighs_rows
from compose.slots.stage import Entry, Stage, State

D_IN, D_OUT = 10, 7


def pairs_of(ranks, generator, dtype=torch.float64):
    def tensor(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return [Pair(tensor(r, D_IN), tensor(D_OUT, r), 0.5 + i) for i, r in enumerate(ranks)]


@st.composite
def mixtures(draw):
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rows, fold = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    per_token, length = draw(st.booleans()), draw(st.sampled_from([1, 3, 9]))
    zeros = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return ranks, rows, fold, per_token, length, zeros, draw(st.integers(0, 2**16))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(mixtures())
def test_all_backends_agree_in_values_and_gradients(mixture):
    ranks, rows, fold, per_token, length, zeros, seed = mixture
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs_of(ranks, generator)
    shape = (rows, length, len(ranks)) if per_token else (rows, len(ranks))
    weights = torch.randn(shape, generator=generator).double()
    weights = weights * (torch.rand(shape, generator=generator) >= zeros)
    x = torch.randn(rows * fold, length, D_IN, generator=generator).double()
    y = torch.randn(rows * fold, length, D_OUT, generator=generator).double()

    spread = weights.repeat_interleave(fold, 0).reshape(rows * fold, -1, len(ranks))
    expected = y + sum(spread[..., e, None] * p.scale * (x @ p.A.T @ p.B.T) for e, p in enumerate(pairs))
    leaves = [t for p in pairs for t in (p.A, p.B)]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)

    tried = 0
    for name, backend in BACKENDS.items():
        if per_token and name in ("gather", "segment"):
            with pytest.raises(ValueError, match="per row"):
                backend(pairs, weights)
            continue
        before = y.clone()
        got = backend(pairs, weights)(y, x)
        assert torch.equal(y, before), f"{name} writes into its input"
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        # A backend that skips experts without weight leaves them out of the graph.
        loss = got.square().sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        for grad, right in zip(grads, wanted, strict=True):
            grad = torch.zeros_like(right) if grad is None else grad
            torch.testing.assert_close(grad, right, atol=1e-7, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        tried += 1
    assert tried >= 3
    assert choose(ranks, weights) in BACKENDS


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_batch_that_is_no_multiple_is_refused(name):
    pairs = pairs_of([2, 3], torch.Generator().manual_seed(0))
    run = BACKENDS[name](pairs, torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64))
    with pytest.raises(ValueError, match="3 rows and the batch has 4"):
        run(torch.zeros(4, 2, D_OUT).double(), torch.zeros(4, 2, D_IN).double())


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backends_keep_half_precision(name):
    generator = torch.Generator().manual_seed(0)
    pairs = pairs_of([2, 3], generator, torch.bfloat16)
    x, y = torch.randn(2, 4, D_IN).bfloat16(), torch.randn(2, 4, D_OUT).bfloat16()
    weights = torch.tensor([[1.0, 0.5], [0.25, 0.0]])
    out = BACKENDS[name](pairs, weights)(y, x)
    exact = BACKENDS["loop"]([Pair(p.A.double(), p.B.double(), p.scale) for p in pairs], weights.double())
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact(y.double(), x.double())).abs().max() < 0.3


# -- nodes on a plain linear map -----------------------------------------------------------------------------------


class Site:
    """y = W x + c, counting how often it is asked."""

    def __init__(self, bias: bool = True):
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(D_OUT, D_IN, generator=generator)
        self.bias = torch.randn(D_OUT, generator=generator) if bias else None
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        y = x @ self.weight.T
        return State(y if self.bias is None else y + self.bias, self.bias)


def entry(name, weight=1.0, *, live=False, **atoms):
    return Entry(name, name, Atoms(**atoms), weight, live)


def low_rank(name, weight=1.0, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, D_IN, generator=generator), torch.randn(D_OUT, 2, generator=generator)
    return entry(name, weight, A=a, B=b, scale=0.5, **options)


X = torch.randn(4, 3, D_IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gain_scales_the_bias_only_where_it_says_so(bias):
    site = Site(bias)
    gain = torch.rand(D_OUT) + 0.5
    whole = Stage([entry("a", gain=gain, gain_scales_bias=True)]).run(site, X).y
    torch.testing.assert_close(whole, site(X).y * gain)
    weight_only = Stage([entry("a", gain=gain)]).run(site, X).y
    torch.testing.assert_close(weight_only, X @ site.weight.T * gain + (site.bias if bias else 0.0))
    both = Stage([entry("a", gain=gain), entry("b", 2.0, gain=gain, gain_scales_bias=True)]).run(site, X)
    torch.testing.assert_close(
        both.y, X @ site.weight.T * (1 + 3 * (gain - 1)) + (site.bias * (1 + 2 * (gain - 1)) if bias else 0.0)
    )
    if bias:
        torch.testing.assert_close(both.c, site.bias * (1 + 2 * (gain - 1)))


def test_a_gain_after_a_bias_scales_what_the_bias_added():
    site = Site()
    shift, gain = torch.randn(D_OUT), torch.rand(D_OUT) + 0.5
    first, then = Stage([entry("b", bias=shift)]), Stage([entry("g", gain=gain, gain_scales_bias=True)])
    torch.testing.assert_close(Chain([first, then]).run(site, X).y, (site(X).y + shift) * gain)
    keeps = Stage([entry("g", gain=gain)])
    torch.testing.assert_close(Chain([first, keeps]).run(site, X).y, X @ site.weight.T * gain + site.bias + shift)


def test_a_delta_may_be_sparse():
    site = Site()
    dense = torch.randn(D_OUT, D_IN) * (torch.rand(D_OUT, D_IN) > 0.7)
    places = dense.flatten().nonzero().flatten()
    for delta in (Dense(dense), Sparse(places, dense.flatten()[places], (D_OUT, D_IN))):
        out = Stage([entry("d", 0.5, delta=delta)]).run(site, X).y
        torch.testing.assert_close(out, site(X).y + 0.5 * X @ dense.T)


def test_a_replacement_does_not_compute_what_it_replaces():
    site, head = Site(), torch.nn.Linear(D_IN, D_OUT)
    out = Stage([entry("h", function=Replace(head))]).run(site, X).y
    assert torch.equal(out, head(X))
    assert site.calls == 0
    half = Stage([entry("h", 0.5, function=Replace(head))]).run(site, X).y
    torch.testing.assert_close(half, 0.5 * site(X).y + 0.5 * head(X))


def test_a_function_runs_only_for_the_rows_that_have_it():
    site, seen = Site(), []

    def fn(z):
        seen.append(z.shape[0])
        return torch.tanh(z)

    weight = torch.tensor([0.0, 2.0])
    out = Stage([entry("f", weight, function=Function(fn))]).run(site, X).y
    base = site(X).y
    torch.testing.assert_close(out, torch.cat([base[:2], base[2:] + 2 * torch.tanh(base[2:])]))
    assert seen == [2]
    Stage([entry("f", torch.zeros(2), function=Function(fn))]).run(site, X)
    assert seen == [2]


def test_what_lies_below_is_computed_once():
    site = Site()
    lora, other = Stage([low_rank("a")]), Stage([low_rank("b", seed=1)])
    gains = Stage([entry("g", gain=torch.rand(D_OUT))])
    Mix([(1.0, Chain([lora, gains])), (0.5, Chain([other, gains])), (torch.rand(4), lora)]).run(site, X)
    assert site.calls == 1


def test_branches_do_not_see_each_other():
    site = Site()
    a, b = Stage([low_rank("a")]), Stage([low_rank("b", seed=1)])
    gains = Stage([entry("g", gain=torch.rand(D_OUT) + 0.5, gain_scales_bias=True)])
    base = site(X).y
    one, other = Chain([a, gains]).run(site, X).y, Chain([b, gains]).run(site, X).y
    mixed = Mix([(2.0, Chain([a, gains])), (-0.5, Chain([b, gains]))]).run(site, X)
    torch.testing.assert_close(mixed.y, base + 2 * (one - base) - 0.5 * (other - base))
    assert torch.equal(site(X).y, base)


def test_live_factors_keep_their_precision():
    """A float32 adapter on a bfloat16 base: the update is rounded once, at the end."""
    site = Site()
    site.weight, site.bias = site.weight.bfloat16(), site.bias.bfloat16()
    x = X.bfloat16()
    live = low_rank("a", live=True)
    out = Stage([live]).run(site, x).y
    exact = site(x).y.float() + 0.5 * x.float() @ live.atoms.A.T @ live.atoms.B.T
    assert torch.equal(out, exact.bfloat16())
    half = Entry("h", "h", Atoms(A=live.atoms.A.bfloat16(), B=live.atoms.B.bfloat16()), 1.0, live=False)
    assert Stage([half, live]).run(site, x).y.dtype == torch.bfloat16


@pytest.mark.parametrize(("a", "b"), list(product([2.0, torch.ones(3) * 2, torch.ones(3, 5) * 2], repeat=2)))
def test_weights_multiply_whatever_their_shapes(a, b):
    result = multiply(a, b)
    assert torch.as_tensor(result).eq(4).all()
    dims = max(x.dim() if isinstance(x, torch.Tensor) else 0 for x in (a, b))
    assert (result.dim() if isinstance(result, torch.Tensor) else 0) == dims


def test_row_and_token_weights_stand_in_one_stage():
    site = Site()
    row, token = torch.rand(4), torch.rand(4, 3)
    entries = [low_rank("a", row), low_rank("b", token, seed=1), low_rank("c", 0.5, seed=2)]
    entries += [entry("g", token, gain=torch.rand(D_OUT)), entry("s", row, bias=torch.randn(D_OUT))]
    stage = Stage(entries)
    assert weighs_rows(stage)
    together = stage.run(site, X).y
    for i, t in product(range(4), range(3)):
        here = [Entry(e.name, e.key, e.atoms, _at(e.coefficient, i, t), False) for e in entries]
        alone = Stage(here).run(site, X[i : i + 1, t : t + 1]).y
        torch.testing.assert_close(together[i : i + 1, t : t + 1], alone)


def _at(weight, i, t):
    if not isinstance(weight, torch.Tensor):
        return weight
    return float(weight[i] if weight.dim() == 1 else weight[i, t])
