"""Kronecker products and Fastfood projections: what they are without being written out."""

from __future__ import annotations

import hashlib

import torch

from compose.kernels.fastfood import Fastfood, hadamard
from compose.kernels.maps import Kronecker, factors_of


def test_a_kronecker_map_is_the_product():
    left, right = torch.randn(3, 5), torch.randn(4, 2)
    x = torch.randn(2, 7, 10)
    delta = Kronecker(left, right, 0.5)
    torch.testing.assert_close(delta(x), x @ (0.5 * torch.kron(left, right)).T)


def test_splits_are_near_the_root_or_near_the_factor():
    assert [factors_of(n, -1) for n in (256, 128, 127, 48)] == [(16, 16), (8, 16), (1, 127), (6, 8)]
    assert [factors_of(n, 4) for n in (128, 6, 4)] == [(4, 32), (2, 3), (4, 1)]


def test_the_hadamard_transform_is_its_own_inverse_and_derivative():
    x = torch.randn(16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    assert torch.autograd.gradcheck(hadamard, (x,))


def test_the_transform_is_the_kronecker_power_of_two_by_two_in_any_precision_around_it():
    h = torch.ones(1, 1)
    for _ in range(9):
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    x = torch.randn(512)
    with torch.inference_mode():
        hadamard(x)  # nothing of such a call may be left over for one that wants gradients
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hadamard(x)
    torch.testing.assert_close(y, h @ x / 512**0.5, atol=1e-5, rtol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, h.sum(0) / 512**0.5, atol=1e-5, rtol=1e-5)


def test_a_projection_of_a_short_vector_is_the_whole_product():
    make = Fastfood.seeded(5, 300, "0:layer")
    n, v = len(make.signs), torch.randn(5)
    padded = torch.cat([v, torch.zeros(n - 5)])
    mixed = hadamard(padded * make.signs)[make.order.long()] * make.normal
    torch.testing.assert_close(make(v), hadamard(mixed)[:300] * (n / 300) ** 0.5, atol=1e-5, rtol=1e-5)


def test_a_projection_is_linear_keeps_lengths_and_comes_from_its_seed():
    make = Fastfood.seeded(50, 3000, "0:layer")
    u, v = torch.randn(2, 50)
    torch.testing.assert_close(make(u + 2 * v), make(u) + 2 * make(v), atol=1e-5, rtol=0)
    matrix = torch.stack([make(e) for e in torch.eye(50)])  # (50, 3000)
    lengths = matrix.norm(dim=1)
    assert 0.9 < lengths.mean() < 1.1 and lengths.std() < 0.1
    assert (matrix @ matrix.T - torch.diag(lengths**2)).abs().max() < 0.1  # nearly orthogonal
    assert not torch.equal(make(u), Fastfood.seeded(50, 3000, "0:other")(u))
    parts = b"".join(t.numpy().tobytes() for t in (make.signs, make.order))
    assert hashlib.sha256(parts).hexdigest()[:16] == "41f02b7ec3b17361"  # the same on every machine, for good
