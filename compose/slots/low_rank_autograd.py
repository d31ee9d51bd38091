"""A low-rank pair while it trains on a frozen linear layer: y = W x + b + s B A x as one node of the autograd graph.

Written out, the graph would hold y twice, add two gradients of x, and read a quantized W through a node of its own.
Here the products run in place, and what is kept for the backward pass is x and h = A x: W is read (dequantized) again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compose.base.weights import dense_weight

__all__ = ["apply", "fits"]


def fits(layer: nn.Module, x: Tensor, a: Tensor) -> bool:
    """Whether `apply` may stand for this layer: a frozen nn.Linear, plain or nf4, in a call that learns."""
    if not isinstance(layer, nn.Linear) or layer.weight.requires_grad or torch.compiler.is_compiling():
        return False
    readable = layer.weight.is_floating_point() or hasattr(layer.weight, "quant_state")
    return readable and torch.is_grad_enabled() and a.requires_grad and x.is_floating_point()


def apply(
    layer: nn.Module,
    own: Callable[[Tensor], Tensor],
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    dtype: torch.dtype,
) -> Tensor:
    """own(x) + s B A drop(x), ``own`` the forward of the layer; x (..., d_in), A (r, d_in), B (d_out, r).

    W is multiplied in ``dtype`` (autocast's, where it is on), the pair in the wider of its own and that of x.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = inner = torch.get_autocast_dtype(x.device.type)
    else:
        inner = torch.promote_types(a.dtype, x.dtype)
    dropped = nn.functional.dropout(x, dropout) if dropout else None
    return cast("Tensor", _Learning.apply(x, dropped, a, b, scale, layer, own, dtype, inner))  # type: ignore[no-untyped-call]


class _Learning(torch.autograd.Function):
    """For N tokens: `x`, `z` (N, d_in), `z` being `x` or `x` after dropout; `h = z A^T` (N, r); `y` (N, d_out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        layer: nn.Module,
        forward: Callable[[Tensor], Tensor],
        outer: torch.dtype,
        inner: torch.dtype,
    ) -> Tensor:
        y = forward(x)
        z = x if dropped is None else dropped
        own, scaled = a.to(inner), (b * scale).to(inner)
        h = z.reshape(-1, z.shape[-1]).to(inner) @ own.T
        flat = y.reshape(-1, y.shape[-1]).to(inner).addmm_(h, scaled.T)
        ctx.save_for_backward(z, own, scaled, h)
        ctx.scale, ctx.layer, ctx.drops = scale, layer, dropped is not None
        ctx.outer, ctx.types = outer, (x.dtype, a.dtype, b.dtype)
        return flat.view(y.shape).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, a, b, h = ctx.saved_tensors
        of_x, of_dropped, of_a, of_b = ctx.needs_input_grad[:4]
        outside = gradient.reshape(-1, gradient.shape[-1])
        inside = outside.to(h.dtype)
        gh = inside @ b  # (N, r)
        gx = gz = None
        if of_x:
            gx = (outside.to(ctx.outer) @ dense_weight(ctx.layer).to(ctx.outer)).to(ctx.types[0])
        if of_dropped:
            gz = (gh @ a).to(z.dtype).view(z.shape)
        elif gx is not None and not ctx.drops:
            gx = gx.addmm_(gh, a) if gx.dtype == gh.dtype else gx + (gh @ a).to(gx.dtype)
        ga = (gh.T @ z.reshape(-1, z.shape[-1]).to(gh.dtype)).to(ctx.types[1]) if of_a else None
        gb = (inside.T @ h).to(ctx.types[2]).mul_(ctx.scale) if of_b else None
        return None if gx is None else gx.view(z.shape), gz, ga, gb, None, None, None, None, None
