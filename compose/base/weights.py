"""Reading the weight of a frozen linear layer, whatever holds it: nn.Linear, Conv1D, bitsandbytes int8 and nf4."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hub.errors import GateError


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight as (d_out, d_in) floats, dequantized if need be (a temporary, except for a plain nn.Linear)."""
    weight = cast("Tensor", layer.weight)
    if weight.device.type == "meta":
        raise offloaded(f"a layer {tuple(weight.shape)}")
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


def offloaded(what: str) -> GateError:
    """The error for weights that are needed and are not in memory."""
    return GateError(
        f"{what} is offloaded: its weights are in memory only while it runs, and adapters need them at other times",
        hint='load the model on one device (device_map={"": "cpu"}), hold it smaller (quantize="nf4"), '
        "or let adapters act elsewhere (layers=...)",
    )


@torch.no_grad()
def floating_copy(module: nn.Module) -> nn.Module:
    """A float32 copy of a module to train whole; quantized layers inside it become plain linear ones."""
    standing = {id(inner.__dict__["forward"]): None for inner in module.modules() if "forward" in inner.__dict__}
    clone = copy.deepcopy(module, dict(standing))  # without what stands in forwards: a copy is nobody's layer
    for inner in clone.modules():
        inner.__dict__.pop("forward", None)
    if (plain := _plain(clone)) is not None:
        clone = plain
    for path, inner in list(clone.named_modules()):
        if path and (plain := _plain(inner)) is not None:
            parent, _, name = path.rpartition(".")
            setattr(clone.get_submodule(parent), name, plain)
    floats: dict[nn.Parameter, nn.Parameter] = {}  # parameters that share one stay tied
    for inner in clone.modules():  # not clone.float(), which swaps storages, and tensors without one cannot be swapped
        for name, parameter in inner._parameters.items():
            if parameter is not None and parameter.dtype != torch.float32 and parameter.is_floating_point():
                inner._parameters[name] = floats.setdefault(parameter, nn.Parameter(parameter.float()))
        for name, buffer in inner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                inner._buffers[name] = buffer.float()
    return clone.requires_grad_(True)


def _plain(layer: nn.Module) -> nn.Linear | None:
    """A quantized layer as nn.Linear, None for any other module."""
    if not isinstance(layer, nn.Linear) or layer.weight.is_floating_point():
        return None
    weight, bias = dense_weight(layer), layer.bias
    plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device=weight.device)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain


def with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The module's own forward on other values of some of its parameters; the module itself is not touched.

    Its parameters are not exchanged for the time of the call, which another thread would see.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, **values}
    twin.__dict__.pop("forward", None)  # what stands in the module's forward
    return twin.forward


@torch.no_grad()
def row_norm_squared(layer: nn.Module, *, rows: int = 1024) -> Tensor:
    """||W||^2 of each output row, (d_out,) float32; blockwise, so a bf16 weight is never copied whole to fp32."""
    weight = dense_weight(layer)
    return torch.cat([block.float().square().sum(1) for block in torch.split(weight, rows)])


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias (d_out,) of a linear-like layer, or None."""
    return cast("Tensor | None", getattr(layer, "bias", None))


def acts_on_features(module: nn.Module) -> bool:
    """Whether a module acts on the last dimension of whatever comes in: linear layers do, and most normalizations.

    Some of those for images do not: they have the channels in front.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    shape = 2, len(weight) + 1, len(weight)
    # An offloaded module fetches its weights for the call, and leaves them where they are if the call fails.
    device = "cpu" if weight.device.type == "meta" else weight.device
    try:
        with torch.no_grad():
            y = module(torch.zeros(shape, dtype=weight.dtype, device=device))
    except (RuntimeError, TypeError, ValueError):  # it takes images only
        return False
    return isinstance(y, Tensor) and y.shape == shape
