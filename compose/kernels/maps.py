"""Linear maps D added to a frozen weight, in the form each kind has them: `y = W x + D x`, D (d_out, d_in).

A map knows how to apply itself without becoming a matrix, and how to become one for a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F


class LinearMap(Protocol):
    """A linear map D (d_out, d_in)."""

    def __call__(self, x: Tensor) -> Tensor:
        """`D x` for x (..., d_in), in the dtype of x."""

    def to(self, dtype: torch.dtype) -> LinearMap:
        """The same map with its values laid out once for activations of ``dtype``."""

    def dense(self) -> Tensor:
        """D as a matrix."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix (d_out, d_in)."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """One GEMM in the dtype of x: on a quantized base that is its compute dtype."""
        return F.linear(x, self.weight.to(x.dtype))

    def to(self, dtype: torch.dtype) -> Dense:
        """Cast the matrix."""
        return Dense(self.weight.to(dtype))

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.weight


@dataclass(frozen=True, eq=False)
class Sparse:
    """Values (n,) at flat indices (n,), sorted, of a matrix ``shape`` (d_out, d_in)."""

    indices: Tensor
    values: Tensor
    shape: tuple[int, int]
    laid_out: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """A sparse product in float32, differentiable in x and in the values."""
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, self.shape[1]).float()
            matrix = self._matrix() if self.laid_out is None else self.laid_out
            y = torch.sparse.mm(matrix, flat.T).T
        return cast("Tensor", y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype))

    def _matrix(self) -> Tensor:
        rows = self.indices.div(self.shape[1], rounding_mode="floor")
        places = torch.stack([rows, self.indices - rows * self.shape[1]])
        return torch.sparse_coo_tensor(
            places, self.values.float(), self.shape, is_coalesced=True, check_invariants=False
        )

    def to(self, dtype: torch.dtype) -> Sparse:
        """Keep the sparse matrix: it is applied in float32 whatever comes in."""
        return replace(self, laid_out=self._matrix())

    def dense(self) -> Tensor:
        """D as a matrix, zero outside the indices."""
        zeros = self.values.new_zeros(self.shape[0] * self.shape[1])
        return zeros.index_put((self.indices,), self.values).view(self.shape)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """`D = s (L kron R)`, L (l1, l2), R (r1, r2): d_out = l1 r1, d_in = l2 r2.

    `(L kron R) vec(X) = vec(L X R^T)` for X (l2, r2), row by row: l2 r2 (r1 + l1 r1 / r2) products, not d_in d_out.
    """

    left: Tensor
    right: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """`s L X R^T` for X (..., l2, r2), the input in rows."""
        left, right = self.left.to(x.dtype), (self.right * self.scale).to(x.dtype)
        parts = x.reshape(*x.shape[:-1], left.shape[1], right.shape[1])  # (..., l2, r2)
        return torch.matmul(left, F.linear(parts, right)).flatten(-2)  # (..., l1, r1) -> (..., d_out)

    def to(self, dtype: torch.dtype) -> Kronecker:
        """Cast the factors, the scale rounded in only once."""
        return Kronecker(self.left.to(dtype), (self.right * self.scale).to(dtype), 1.0)

    def dense(self) -> Tensor:
        """The Kronecker product."""
        return self.scale * torch.kron(self.left, self.right)


@dataclass(frozen=True, eq=False)
class Lifted:
    """A map into some rows of a fused output: ``lift`` puts what comes out, along a dimension, into the whole."""

    of: LinearMap
    lift: Callable[[Tensor, int], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """`D x` in its rows, zero in the others."""
        return self.lift(self.of(x), -1)

    def to(self, dtype: torch.dtype) -> Lifted:
        """Lay out the map inside."""
        return replace(self, of=self.of.to(dtype))

    def dense(self) -> Tensor:
        """D as a matrix, with rows of zeros."""
        return self.lift(self.of.dense(), 0)


def factors_of(dimension: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = dimension: m = factor where it divides, else the largest divisor up to it and to the root."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = min(math.isqrt(dimension), factor if factor > 0 else dimension)
    m = next(m for m in range(max(1, most), 0, -1) if dimension % m == 0)
    return m, dimension // m
