"""Arithmetic on low-rank deltas D = s B A in factor space: nothing here forms D, except where it is given.

A pair of rank r at a site of d_out x d_in costs O(d r^2) instead of O(d^3): inner products are r x r work, and the
singular value decomposition of a sum goes through two thin QRs and a small core (see :func:`core`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compose.kernels.low_rank import Pair

_OVERSAMPLE = 16  # extra directions of the randomized range finder
_ITERATIONS = 4  # its power iterations
_SLICE = 2**24  # elements of a slice of the (R, R) products
_BLOCK = 2**19  # elements of a block of rows
_ROUNDING = 1e-11  # of the energy: what float32 leaves of nothing


def inner(a: Pair, b: Pair) -> float:
    """<D_a, D_b> = s_a s_b tr((B_a^T B_b) (A_b A_a^T)), the Frobenius inner product, in r_a x r_b work."""
    product = (a.B.float().T @ b.B.float()).double() * (a.A.float() @ b.A.float().T).double()
    return a.scale * b.scale * float(product.sum())


def gram(pairs: Sequence[Pair]) -> Tensor:
    """All inner products <D_i, D_j>, (N, N) float64: products of all B and of all A, R = sum r, a slice at a time."""
    ranks = torch.tensor([p.rank for p in pairs])
    owner = torch.repeat_interleave(torch.arange(len(pairs)), ranks)  # (R,): which pair a column of B belongs to
    b = torch.cat([p.B.float() for p in pairs], dim=1)  # (d_out, R)
    a = torch.cat([p.A.float() * p.scale for p in pairs])  # (R, d_in)
    owner = owner.to(a.device)
    # <D_i, D_j> = sum over columns of i and of j of <b, b'> <a, a'>: summed over j's columns first, then over i's.
    half = torch.zeros(len(owner), len(pairs), dtype=torch.float64, device=a.device)  # (R, N)
    for rows in torch.arange(len(owner)).split(max(1, _SLICE // max(1, len(owner)))):  # type: ignore[no-untyped-call]
        products = (b[:, rows].T @ b).double() * (a[rows] @ a.T).double()  # (slice, R)
        half[rows] = half[rows].index_add(1, owner, products)
    return torch.zeros(len(pairs), len(pairs), dtype=torch.float64, device=a.device).index_add(0, owner, half)


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """sum_i w_i D_i exactly: A stacked as [w_i s_i A_i] (R, d_in), B side by side (d_out, R), scale 1.

    Pairs of weight zero are left out; if none remains the pair has rank 0.
    """
    kept = [(p, w) for p, w in zip(pairs, weights, strict=True) if w != 0 and p.rank]
    if not kept:
        return Pair(pairs[0].A[:0].float(), pairs[0].B[:, :0].float(), 1.0)
    a = torch.cat([p.A.float() * (w * p.scale) for p, w in kept])
    return Pair(a, torch.cat([p.B.float() for p, _ in kept], dim=1), 1.0)


def core(pair: Pair, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of D = s B A without forming it: (U diag(S), S, V^T).

    QR(A^T) = Q_a R_a and QR(B) = Q_b R_b, of which only R_b is computed; SVD(s R_b R_a^T) = u S v^T; then
    V^T = v^T Q_a^T (k, d_in) and U diag(S) = D V = s B (A V) (d_out, k), with k = min(r, d_out, d_in), or of these the
    first ``rank``; S is whole.
    """
    a, b = pair.A.float(), pair.B.float()
    qa, ra = torch.linalg.qr(a.T)
    rb = torch.linalg.qr(b, mode="r").R
    _, s, v = torch.linalg.svd(pair.scale * (rb @ ra.T), full_matrices=False)
    vh = v[:rank] @ qa.T
    return b @ (pair.scale * (a @ vh.T)), s, vh


def truncate(pair: Pair, rank: int) -> tuple[Pair, float]:
    """Best approximation of rank ``rank`` (Eckart-Young) and the energy it leaves out, ||D - D_k||^2.

    A pair that has no higher rank is returned as it is; otherwise the rows of the new A are orthonormal.
    """
    if pair.rank <= rank:
        return pair, 0.0
    left, s, vh = core(pair, rank)
    return Pair(vh, left, 1.0), _left_out(s, rank)


def _left_out(singular: Tensor, rank: int) -> float:
    squares = singular.double().square()
    rest = float(squares[rank:].sum())
    return rest if rest > _ROUNDING * float(squares.sum()) else 0.0


def from_dense(delta: Tensor, rank: int) -> tuple[Pair, float]:
    """A pair of rank ``rank`` close to the matrix ``delta`` (d_out, d_in), and ||D - B A||^2, which is exact.

    Small matrices take a full SVD. Larger ones take a randomized range finder with power iterations (arXiv:0909.4061),
    seeded, whose error exceeds the optimum slightly; what it left out is measured, not estimated.
    """
    width = rank + _OVERSAMPLE
    if min(delta.shape) <= 4 * width:
        u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
        return Pair(vh[:rank], u[:, :rank] * s[:rank], 1.0), _left_out(s, rank)
    generator = torch.Generator().manual_seed(0)
    # A basis of what delta does to random vectors, turned towards its largest directions by power iterations...
    q = delta @ torch.randn(delta.shape[1], width, generator=generator).to(delta)
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(delta.T @ torch.linalg.qr(q).Q).Q
        q = delta @ q
    q = torch.linalg.qr(q).Q  # (d_out, width)
    # ... in which a small SVD finds them.
    u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
    pair = Pair(vh[:rank], (q @ u[:, :rank]) * s[:rank], 1.0)
    return pair, residual(pair, delta)


def residual(pair: Pair, delta: Tensor) -> float:
    """||D - s B A||^2, a block of rows at a time; 0 within float32's rounding."""
    a = pair.A * pair.scale
    step = max(1, _BLOCK // delta.shape[1])
    starts = range(0, delta.shape[0], step)
    left_out = sum((energy(torch.addmm(delta[i : i + step], pair.B[i : i + step], a, alpha=-1)) for i in starts), 0.0)
    return left_out if left_out > _ROUNDING * energy(delta) else 0.0


def energy(delta: Tensor) -> float:
    """||D||^2, accumulated in float64."""
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2


def pad(pair: Pair, rank: int) -> Pair:
    """The same delta with zero rows and columns up to ``rank``, and its scale folded into A."""
    a, b = pair.A.float() * pair.scale, pair.B.float()
    missing = rank - pair.rank
    if missing:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return Pair(a, b, 1.0)
