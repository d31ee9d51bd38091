"""The slot: the wrapper at a site, holding the frozen base layer and what the active composition does there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from compose.kernels import expand
from compose.stage import Chain, Node, State
from compose.weights import bias_of, row_norm_squared


class Context:
    """What all slots of a model share: the batch size of the forward under way."""

    batch: int = 0


class Slot(nn.Module):
    """Stands in the module tree where a base layer stood; without a program it is that layer."""

    is_slot = True

    def __init__(self, base_layer: nn.Module, context: Context) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.program: Node | None = None
        self.per_row = False  # the program weighs rows or tokens apart
        self.keep_input = False  # another slot taps this one's input
        self.seen: Tensor | None = None
        self._row_norm: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # weight, bias, in_features, ...: models ask their layers for these
            return getattr(super().__getattr__("base_layer"), name)

    def input(self) -> Tensor:
        """The input of the forward under way, kept for a function that taps this site."""
        return cast("Tensor", self.seen)

    def clear(self) -> None:
        """Forget the program."""
        self.program, self.per_row, self.keep_input, self.seen = None, False, False, None

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The base layer's output with the active composition applied."""
        if self.keep_input:
            self.seen = x
        if self.program is None:
            return cast("Tensor", self.base_layer(x, *args, **options))
        if self.per_row and x.dim() == 2:  # flattened (B * T, d), or pooled (B, d)
            rows = x.reshape(self.context.batch, -1, x.shape[-1])
            return self.program.run(self._below, rows).y.flatten(0, 1)
        return self.program.run(self._below, x).y

    def _below(self, x: Tensor) -> State:
        return State(self.base_layer(x), bias_of(self.base_layer))

    def row_norm_squared(self) -> Tensor:
        """||W||^2 of each row, computed once."""
        if self._row_norm is None:
            self._row_norm = row_norm_squared(self.base_layer)
        return self._row_norm


class BelowView:
    """The linear map an adapter sits on: the slot's base layer with the stages before it (see atoms.Below)."""

    def __init__(self, slot: Slot, before: Sequence[Node]) -> None:
        self._slot, self._before = slot, tuple(before)

    def apply(self, x: Tensor) -> Tensor:
        """W' x, bias left out; x (n, d_in)."""
        layer = self._slot.base_layer
        x = x.to(compute_dtype(layer))[None]  # (1, n, d_in): as one row of a batch
        y, c = Chain(self._before).run(self._slot._below, x) if self._before else self._slot._below(x)
        return (y if c is None else y - c)[0]

    def row_norm_squared(self) -> Tensor:
        """||W'||^2 of each row: from the weight, or by feeding unit vectors through the stages before."""
        if not self._before:
            return self._slot.row_norm_squared()
        width = int(self._slot.in_features if hasattr(self._slot, "in_features") else self._slot.weight.shape[0])
        total: Tensor | float = 0.0
        for units in torch.split(torch.eye(width, device=self.device), 256):
            total = total + self.apply(units).float().square().sum(0)
        return cast("Tensor", total)

    @property
    def device(self) -> torch.device:
        """Where the base layer lives."""
        return cast("Tensor", self._slot.weight).device


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype a layer computes in: its weight's, or a quantized layer's compute dtype."""
    dtype = getattr(layer, "compute_dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    weight = cast("Tensor", layer.weight)
    return weight.dtype if weight.dtype.is_floating_point else torch.float16


class PositionSlot(nn.Module):
    """Wraps the module that reads position ids and shifts them by a number per row.

    Tokens after a prefix of n stand at n, n + 1, ...; rows whose prompt is shorter than the batch's longest one are
    shifted back by the difference.
    """

    is_slot = True

    def __init__(self, base_layer: nn.Module, context: Context) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.offset: Tensor | None = None  # (R, 1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **options: Any) -> Any:
        """The base module on shifted ids: the keyword ``position_ids`` or the last integer argument."""
        if self.offset is not None:
            if options.get("position_ids") is not None:
                options["position_ids"] = self._shift(options["position_ids"])
            else:
                at = max(i for i, a in enumerate(args) if isinstance(a, Tensor) and not a.is_floating_point())
                args = (*args[:at], self._shift(args[at]), *args[at + 1 :])
        return self.base_layer(*args, **options)

    def _shift(self, ids: Tensor) -> Tensor:
        offset = cast("Tensor", self.offset).to(ids.device)
        if ids.dim() == 1:
            ids = ids[None]
        if offset.shape[0] > 1:
            offset = expand(offset, self.context.batch)
        return (ids + offset).clamp_min(0)
