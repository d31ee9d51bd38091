"""Reading the weight of a frozen linear layer, whatever holds it: nn.Linear, Conv1D, bitsandbytes int8 and nf4."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight as (d_out, d_in) floats, dequantized if need be (a temporary, except for a plain nn.Linear)."""
    weight = cast("Tensor", layer.weight)
    if isinstance(layer, Conv1D):
        return weight.T
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return cast("Tensor", dequantize_4bit(weight.data, weight.quant_state))
    if weight.dtype == torch.int8:
        scale = getattr(weight, "SCB", None)
        if scale is None:
            scale = cast("Any", layer).state.SCB
        return weight.data.float() * (cast("Tensor", scale).float()[:, None] / 127.0)
    return weight


@torch.no_grad()
def row_norm_squared(layer: nn.Module, *, rows: int = 1024) -> Tensor:
    """||W||^2 of each output row, (d_out,) float32; blockwise, so a bf16 weight is never copied whole to fp32."""
    weight = dense_weight(layer)
    return torch.cat([block.float().square().sum(1) for block in torch.split(weight, rows)])


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias (d_out,) of a linear-like layer, or None."""
    return cast("Tensor | None", getattr(layer, "bias", None))
