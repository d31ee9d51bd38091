"""The slot: the wrapper at a site, holding the frozen base layer and what the active composition does there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from compose.base.weights import bias_of, row_norm_squared
from compose.errors import KindError
from compose.kernels.fused_rows import FusedRows
from compose.slots import low_rank_autograd as learning
from compose.slots.branches import Chain, stages
from compose.slots.frozen_stage import FrozenStage, frozen_stage
from compose.slots.gate import GatedExperts
from compose.slots.stage import Node, Stage, State


class Context:
    """What all slots of a model share."""

    batch: int = 0  # rows of the forward under way
    past: int = 0  # tokens that its cache holds
    tokens: int = 0  # length of the weights per token that are active, if any


class Slot(nn.Module):
    """Stands in the module tree where a base layer stood; without a program it is that layer."""

    is_slot = True
    program: Node | None
    frozen: FrozenStage | None  # the program, where it is a stage that does not train
    per_row: bool  # the program weighs rows or tokens apart
    keep_input: bool  # another slot taps this one's input
    seen: Tensor | None
    taps: list[Slot]  # the slots whose inputs the program reads

    def __init__(self, base_layer: nn.Module, context: Context) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self._row_norm: Tensor | None = None
        self.put: tuple[Tensor, Tensor] | None = None  # at the embedding: where (B, T, 1) a prompt stands, and it
        self.clear()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # weight, bias, in_features, ...: models ask their layers for these
            return getattr(super().__getattr__("base_layer"), name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model (copy.deepcopy) lowers its own adapters, at its first call.
        return {
            **self.__dict__,
            "program": None,
            "frozen": None,
            "per_row": False,
            "seen": None,
            "taps": [],
            "put": None,
        }

    def input(self) -> Tensor:
        """The input of the forward under way, kept for a function that taps this site."""
        return cast("Tensor", self.seen)

    def clear(self) -> None:
        """Forget the program."""
        # Not one by one: a module's __setattr__ is slow, and while an adapter trains this runs at each call.
        self.__dict__.update(program=None, frozen=None, per_row=False, keep_input=False, seen=None, taps=[])

    def snapshot(self) -> dict[str, Any] | None:
        """The program and what it asks for, for `__dict__`; None if there is nothing."""
        if self.program is None and not self.keep_input:
            return None
        return {name: self.__dict__[name] for name in ("program", "frozen", "per_row", "keep_input", "taps")}

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The base layer's output with the active composition applied."""
        if self.keep_input:
            self.seen = x
        y = self.base_layer(x, *args, **options) if self.program is None else self._adapted(self.program, x)
        for slot in self.taps:
            slot.seen = None  # read: a layer's activations must not outlive it
        if self.put is not None:
            (places, embeddings), self.put = self.put, None
            y = torch.where(places, embeddings.to(y.dtype), y)
        return cast("Tensor", y)

    def _adapted(self, program: Node, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_floating_point():  # (B, T, d), or (B, T) token ids
            return self._run(program, x)
        batch = self.context.batch if self.per_row else 1
        return self._run(program, x.reshape(batch, -1, x.shape[-1])).flatten(0, 1)  # was (B * T, d) or pooled (B, d)

    def _run(self, program: Node, x: Tensor) -> Tensor:
        tokens = self.context.tokens
        if tokens and self.per_row and x.shape[1] != tokens:
            raise KindError(
                f"weights were given for {tokens} tokens a row, and {x.shape[1]} come here",
                hint="activate again with weights for the tokens of this call",
            )
        if isinstance(program, Stage | GatedExperts) and program.simple:
            y = self._modules["base_layer"](x)  # type: ignore[misc]  # not by attribute: modules look theirs up slowly
            return program.add(y, x, fresh=not y.requires_grad and y.dtype == x.dtype)
        if self.frozen is not None and _plain(x):
            layer = cast("nn.Module", self._modules["base_layer"])
            return self.frozen.on(layer, x)(layer, x)
        if isinstance(program, Stage) and (whole := self._learned(program, x)) is not None:
            return whole
        return program.run(self._below, x).y

    def _learned(self, program: Stage, x: Tensor) -> Tensor | None:
        """The output where one adapter trains alone, if there is a cheaper way to it than by :meth:`Stage.run`."""
        layer = self.base_layer
        if program.moves is not None and (whole := moved(layer, *program.moves)) is not None:
            return cast("Tensor", functional_call(layer, whole, (x,)))
        if program.learns is not None:
            atoms, weight = program.learns
            a, b = cast("Tensor", atoms.A), cast("Tensor", atoms.B)
            if learning.fits(layer, x, a):
                return learning.apply(layer, x, a, b, atoms.scale * weight, atoms.dropout, compute_dtype(layer))
        return None

    def _below(self, x: Tensor) -> State:
        return State(self.base_layer(x), bias_of(self.base_layer))

    def lay_out(self) -> None:
        """Prepare the program for activations of the dtype that the layer computes in."""
        self.frozen = frozen_stage(self.program)
        weight = getattr(self.base_layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype != torch.int8:  # which takes whatever comes
            like = torch.empty(0, dtype=compute_dtype(self.base_layer), device=weight.device)
            if self.frozen is not None and not cast("Stage", self.program).simple:
                self.frozen.on(self.base_layer, like)
                return
            for stage in stages(self.program):
                stage.lay_out(like)

    def row_norm_squared(self) -> Tensor:
        """`||W||^2` of each row, computed once."""
        if self._row_norm is None:
            self._row_norm = row_norm_squared(self.base_layer)
        return self._row_norm


def _plain(x: Tensor) -> bool:
    """Whether what a layer makes of x has the dtype of x."""
    return x.is_floating_point() and not torch.is_autocast_enabled(x.device.type)


class BelowView:
    """The linear map an adapter sits on: the slot's base layer with the stages before it (see atoms.Below).

    Of an adapter on a part of a fused linear, that is the map into its ``rows``.
    """

    def __init__(self, slot: Slot, before: Sequence[Node], rows: FusedRows | None = None) -> None:
        self._slot, self._before, self._rows = slot, tuple(before), rows

    def apply(self, x: Tensor) -> Tensor:
        """`W' x`, bias left out; x (n, d_in)."""
        layer = self._slot.base_layer
        x = x.to(compute_dtype(layer))[None]  # (1, n, d_in): as one row of a batch
        y, c = Chain(self._before).run(self._slot._below, x) if self._before else self._slot._below(x)
        y = (y if c is None else y - c)[0]
        return y if self._rows is None else self._rows.of(y)

    def row_norm_squared(self) -> Tensor:
        """`||W'||^2` of each row: from the weight, or by feeding unit vectors through the stages before."""
        if not self._before:
            norm = self._slot.row_norm_squared()
            return norm if self._rows is None else self._rows.of(norm)
        width = int(self._slot.in_features if hasattr(self._slot, "in_features") else self._slot.weight.shape[0])
        total: Tensor | float = 0.0
        for units in torch.split(torch.eye(width, device=self.device), 256):
            total = total + self.apply(units).float().square().sum(0)
        return cast("Tensor", total)

    @property
    def layer(self) -> nn.Module:
        """The frozen base layer."""
        return self._slot.base_layer

    @property
    def device(self) -> torch.device:
        """Where the base layer lives."""
        return cast("Tensor", self._slot.weight).device


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype a layer is called with: its bias's, else its weight's, or a quantized layer's compute dtype.

    bitsandbytes casts a bias in place to whatever dtype comes in, so a call in another one would round the base's own.
    """
    bias = bias_of(layer)
    if bias is not None:
        return bias.dtype
    dtype = getattr(layer, "compute_dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    weight = cast("Tensor", layer.weight)
    return weight.dtype if weight.dtype.is_floating_point else torch.float16


def moved(layer: nn.Module, deltas: Mapping[str, Tensor], weight: float) -> dict[str, Tensor] | None:
    """The layer's parameters p + w delta, so that one product does for W x + w D x; None where two are better.

    A quantized layer would be held whole until the backward pass, in another precision the sum would round the delta,
    and of an embedding's rows a batch reads few.
    """
    if isinstance(layer, nn.Embedding):
        return None
    own = {name: cast("Tensor", getattr(layer, name)) for name in deltas}
    if any(own[name].dtype != delta.dtype for name, delta in deltas.items()):
        return None
    turned = {"weight"} if isinstance(layer, Conv1D) else set()  # which holds its matrix transposed
    return {
        name: torch.add(own[name], delta.T if name in turned else delta, alpha=weight) for name, delta in deltas.items()
    }
