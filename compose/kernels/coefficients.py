"""Weights of adapters: numbers, one for each row of a batch, or one for each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from compose.errors import KindError
from compose.kernels.low_rank import expand

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
    if len(tensors) == len(coefficients) and all(t.dim() == 1 for t in tensors):
        return torch.stack(tensors, -1).to(like.device, torch.float32)
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
    """The weight for the rows of the batch, and those where it is not zero; None: all, as for weights that are learned.

    What is not computed for a row cannot reach it: 0 * NaN would.
    """
    if not isinstance(w, Tensor) or w.requires_grad:
        return w, None
    w = expand(w, batch)
    return w, (w != 0).flatten(1).any(1).nonzero().squeeze(1) if w.dim() > 1 else w.nonzero().squeeze(1)


def on_rows(fn: Callable[[Tensor, Tensor], Tensor], rows: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """``fn`` of the rows of x and y that count, zero elsewhere."""
    if rows is None:
        return fn(x, y)
    out = torch.zeros_like(y)
    if len(rows):
        out[rows] = fn(x[rows], y[rows])
    return out


def shield(x: Tensor, c: Coefficient) -> Tensor:
    """`x`, cut off from the gradient where its weight is zero: nothing comes from there, and not `0 * NaN` either."""
    if not isinstance(c, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
        return x
    used = expand(c.detach() != 0, x.shape[0])
    return torch.where(used.reshape(*used.shape, *([1] * (x.dim() - used.dim()))), x, x.detach())


def weigh(term: Tensor, c: Coefficient) -> Tensor:
    """`c` times a term (B, T, d) or (B, d), for c a number, (R,) or (R, T)."""
    if not isinstance(c, Tensor):
        return term if c == 1.0 else term * c
    c = expand(c.to(term.device, term.dtype), term.shape[0])
    c = c.reshape(*c.shape, *([1] * (term.dim() - c.dim())))
    if c.requires_grad:  # a weight that is zero learns from the term, unless that is no number
        return term.masked_fill((c == 0) & ~term.isfinite(), 0) * c
    return (term * c).masked_fill(c == 0, 0)  # 0 * NaN is nothing


def check_coefficients(rows: int, weights: Mapping[str, Coefficient]) -> None:
    """Refuse weights by name whose shapes do not fit together."""
    counts: dict[int, str] = {rows: f"{rows} expressions"} if rows > 1 else {}
    lengths: dict[int, str] = {}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            if not math.isfinite(weight):
                raise KindError(f"the weight of {name!r} is {weight}, not a finite number")
            continue
        if weight.dim() not in (1, 2):
            raise KindError(f"the weight of {name!r} has shape {tuple(weight.shape)}: give (rows,) or (rows, tokens)")
        if not bool(weight.isfinite().all()):
            raise KindError(f"the weight of {name!r} is not finite")
        counts.setdefault(weight.shape[0], f"{weight.shape[0]} rows of {name!r}")
        if weight.dim() == 2 and weight.shape[1] > 1:
            lengths.setdefault(weight.shape[1], f"{weight.shape[1]} tokens of {name!r}")
    for sizes in (counts, lengths):
        if len(sizes) > 1:
            raise KindError("these do not fit together: " + ", ".join(sizes.values()))
