"""Weights of adapters: numbers, one for each row of a batch, or one for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from compose.kernels import expand

Coefficient: TypeAlias = float | Tensor  # a number, or (R,) per row, or (R, T) per token


def multiply(a: Coefficient, b: Coefficient) -> Coefficient:
    """Product of coefficients: rows against tokens broadcast as (R,) -> (R, 1)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() != b.dim():
        a, b = (a[:, None], b) if a.dim() < b.dim() else (a, b[:, None])
    return a * b


def weight_matrix(coefficients: Sequence[Coefficient], like: Tensor) -> Tensor:
    """Coefficients side by side: (R, E) or, if any is per token, (R, T, E). All-number stages give (1, E)."""
    tensors = [c for c in coefficients if isinstance(c, Tensor)]
    shape = torch.Size([1])
    for t in tensors:
        shape = t.shape if len(t.shape) > len(shape) or len(shape) == 1 else shape
    columns = []
    for c in coefficients:
        if isinstance(c, Tensor):
            spread = c[:, None] if c.dim() < len(shape) else c
            columns.append(spread.to(like.device, torch.float32).expand(shape))
        else:
            columns.append(torch.full(shape, float(c), device=like.device))
    return torch.stack(columns, dim=-1)


def used_rows(w: Coefficient, batch: int) -> tuple[Coefficient, Tensor | None]:
    """A weight per row of the batch, and the rows where it is not zero (None: all, as for weights that are learned).

    What is not computed for a row cannot reach it: 0 * NaN would.
    """
    if not isinstance(w, Tensor) or w.dim() != 1 or w.requires_grad:
        return w, None
    w = expand(w, batch)
    return w, w.nonzero().squeeze(1)


def on_rows(fn: Callable[[Tensor, Tensor], Tensor], rows: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """``fn`` of the rows of x and y that count, zero elsewhere."""
    if rows is None:
        return fn(x, y)
    out = torch.zeros_like(y)
    if len(rows):
        out[rows] = fn(x[rows], y[rows])
    return out


def weigh(term: Tensor, c: Coefficient) -> Tensor:
    """C times a term (B, T, d) or (B, d), for c a number, (R,) or (R, T)."""
    if not isinstance(c, Tensor):
        return term if c == 1.0 else term * c
    c = expand(c.to(term.device, term.dtype), term.shape[0])
    c = c.reshape(*c.shape, *([1] * (term.dim() - c.dim())))
    return term * c if c.requires_grad else (term * c).masked_fill(c == 0, 0)  # 0 * NaN is nothing
