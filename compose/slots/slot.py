"""The slot: it stands in the forward of a frozen base layer and computes what a composition does there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compose.atoms import Function, Moved
from compose.base.weights import acts_on_features, bias_of, offloaded, row_norm_squared, with_parameters
from compose.errors import KindError
from compose.kernels.fused_rows import FusedRows
from compose.slots import low_rank_autograd as learning
from compose.slots.branches import Chain, stages, without_functions
from compose.slots.call import Call, Context, Standing
from compose.slots.frozen_stage import FrozenStage, frozen_stage
from compose.slots.gate import GatedExperts
from compose.slots.row_layout import ROWS_FIRST, RowLayout
from compose.slots.stage import Node, Stage, State


@dataclass(eq=False)
class Program:
    """What a composition does at one place: ``node`` is None where another place only taps the input."""

    node: Node | None = None
    frozen: FrozenStage | None = None  # the node, where it is a stage that does not train
    per_row: bool = False  # it weighs rows or tokens apart
    tapped: bool = False  # another place reads the input
    taps: tuple[str, ...] = ()  # the places whose inputs it reads


class Slot(Standing):
    """Stands in the forward of a base layer; without a program it is that layer's own."""

    def __init__(self, layer: nn.Module, path: str, context: Context) -> None:
        super().__init__(layer)
        self.path, self.context = path, context
        self.on_features = acts_on_features(layer)
        self.layout: RowLayout | None = None  # where rows stand in the input; None: unknown
        self.takes_prompt = False
        self._row_norm: tuple[tuple[int, int], Tensor] | None = None

    @property
    def program(self) -> Node | None:
        """What the active composition computes here."""
        program = self.context.idle.composition.programs.get(self.path)
        return None if program is None else cast("Program", program).node

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return next(self.layer.parameters()).device

    def input(self, reader: str) -> Tensor:
        """The input of the call under way, kept for a function at the path ``reader`` that taps this site."""
        call = self.context.call
        kept = call.inputs.get(self.path)
        if kept is None:
            raise KindError(
                f"{self.path} has not run in this call, and an adapter reads what enters it",
                hint="choose another place for the adapter: hub compose sites BASE lists them",
            )
        return self._rows_first(call, kept)[1] if call.composition.programs[reader].per_row else kept

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The base layer's output with the composition of this call applied."""
        call = self.context.call
        program = call.composition.programs.get(self.path)
        if program is None:
            y = self.own(x, *args, **options)
        else:
            if call.waiting:
                call.waiting.discard(self.path)
            if program.tapped:
                call.inputs[self.path] = x
            own = _with(self.own, args, options) if args or options else self.own
            y = own(x) if program.node is None else self._adapted(program, call, own, x)
            for path in program.taps:
                call.inputs.pop(path, None)  # read: a layer's activations must not outlive it
        if self.takes_prompt and call.prompt is not None:
            (places, embeddings), call.prompt = call.prompt, None
            y = self._with_prompt(y, places, embeddings)
        return cast("Tensor", y)

    def _with_prompt(self, y: Tensor, places: Tensor, embeddings: Tensor) -> Tensor:
        if self.layout is not None and self.layout.dim == 1:
            places, embeddings = places.transpose(0, 1), embeddings.transpose(0, 1)
        if places.shape[:2] != y.shape[:2]:
            raise KindError(
                f"a prompt makes room for {places.shape[1]} tokens, and {y.shape[1]} come to {self.path}",
                hint="this model pads its texts itself: pad them to a length that it takes as it is",
            )
        return torch.where(places, embeddings.to(y.dtype), y)

    def _adapted(self, program: Program, call: Call, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if program.per_row:
            layout, rows = self._rows_first(call, x)
            return layout.back(self._run(program, call, own, rows), x, self)
        if x.dim() != 2 or not x.is_floating_point():  # (B, T, d), or (B, T) token ids
            return self._run(program, call, own, x)
        return self._run(program, call, own, x[None])[0]  # was (B * T, d) or pooled (B, d)

    def _rows_first(self, call: Call, x: Tensor) -> tuple[RowLayout, Tensor]:
        layout = self.layout
        if layout is None:
            raise KindError(
                f"nothing says which rows what comes to {self.path} belongs to",
                hint="activate one composition for the whole batch, or keep adapters off there with at(...)",
            )
        if not call.batch and x.dim() == 3:  # called by itself, outside of any call of the model
            return ROWS_FIRST, x
        return layout, layout.rows_first(x, call.batch, call.lengths, self)

    def _run(self, program: Program, call: Call, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        node, tokens = cast("Node", program.node), call.composition.tokens
        if tokens and program.per_row and (x.shape[1] != tokens or not cast("RowLayout", self.layout).tokens):
            raise KindError(
                f"weights were given for {tokens} tokens a row, and {x.shape[1]} come to {self.path}",
                hint="activate again with weights for the tokens of this call",
            )
        if isinstance(node, Stage | GatedExperts) and node.simple:
            y = own(x)
            return node.add(y, x, fresh=not y.requires_grad and y.dtype == x.dtype)
        if program.frozen is not None and _plain(x):
            return program.frozen.on(self.layer, x)(own, x)
        if isinstance(node, Stage) and own == self.own and (whole := self._learned(node, x)) is not None:
            return whole
        return node.run(lambda z: State(own(z), bias_of(self.layer)), x).y

    def _learned(self, stage: Stage, x: Tensor) -> Tensor | None:
        """The output where one adapter trains alone, if there is a cheaper way to it than by :meth:`Stage.run`."""
        layer = self.layer
        if stage.moves is not None and (whole := moved(layer, *stage.moves)) is not None:
            return cast("Tensor", with_parameters(layer, whole)(x))
        if stage.learns is not None:
            atoms, weight = stage.learns
            a, b = cast("Tensor", atoms.A), cast("Tensor", atoms.B)
            if learning.fits(layer, x, a):
                scale = atoms.scale * weight
                return learning.apply(layer, self.own, x, a, b, scale, atoms.dropout, compute_dtype(layer))
        return None

    def below(self, x: Tensor) -> State:
        """What the layer alone makes of x."""
        return State(self.own(x), bias_of(self.layer))

    def lay_out(self, node: Node, *, per_row: bool) -> Program:
        """The program of ``node``, prepared for activations of the dtype that the layer computes in."""
        found = stages(node)
        taps = {f.tap for stage in found for e in stage.functions if isinstance(f := e.atoms.function, Function)}
        program = Program(node, frozen_stage(node), per_row, taps=tuple(tap for tap in taps if tap is not None))
        weight = getattr(self.layer, "weight", None)
        if isinstance(node, GatedExperts) or not isinstance(weight, Tensor) or weight.dtype == torch.int8:
            return program  # int8 takes whatever comes
        if weight.device.type == "meta":
            self._refuse_offloaded(found)
            return program
        like = torch.empty(0, dtype=compute_dtype(self.layer), device=weight.device)
        if program.frozen is not None and not cast("Stage", node).simple:
            program.frozen.on(self.layer, like)
        else:
            for stage in found:
                stage.lay_out(like)
        return program

    def _refuse_offloaded(self, found: Sequence[Stage]) -> None:
        """Only what is added without a look at the layer's own parameters works where these come and go."""
        for stage in found:
            moved_ = [e for e in stage.functions if isinstance(e.atoms.function, Moved)]
            for e in (*stage.gains, *stage.inputs, *stage.biases, *moved_):
                raise offloaded(f"{self.path}, where adapter {e.name!r} acts,")

    def row_norm_squared(self) -> Tensor:
        """`||W||^2` of each row, computed once for the weight that is there."""
        weight = cast("Tensor", self.layer.weight)
        stamp = id(weight), 0 if weight.is_inference() else weight._version
        if self._row_norm is None or self._row_norm[0] != stamp:
            self._row_norm = stamp, row_norm_squared(self.layer)
        return self._row_norm[1]


def _with(own: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """A forward as a function of its first argument."""

    def run(x: Tensor) -> Tensor:
        return cast("Tensor", own(x, *args, **options))

    return run


def _plain(x: Tensor) -> bool:
    """Whether what a layer makes of x has the dtype of x."""
    return x.is_floating_point() and not torch.is_autocast_enabled(x.device.type)


class BelowView:
    """The linear map an adapter sits on: the slot's base layer with the stages before it (see atoms.Below).

    Of an adapter on a part of a fused linear, that is the map into its ``rows``.
    """

    def __init__(self, slot: Slot, before: Sequence[Node], rows: FusedRows | None = None) -> None:
        self._slot, self._before, self._rows = slot, tuple(without_functions(node) for node in before), rows

    def apply(self, x: Tensor) -> Tensor:
        """`W' x`, bias left out; x (n, d_in)."""
        x = x.to(compute_dtype(self.layer))[None]  # (1, n, d_in): as one row of a batch
        y, c = Chain(self._before).run(self._slot.below, x) if self._before else self._slot.below(x)
        y = (y if c is None else y - c)[0]
        return y if self._rows is None else self._rows.of(y)

    def row_norm_squared(self) -> Tensor:
        """`||W'||^2` of each row: from the weight, or by feeding unit vectors through the stages before."""
        if not self._before:
            norm = self._slot.row_norm_squared()
            return norm if self._rows is None else self._rows.of(norm)
        layer = cast("Any", self.layer)
        width = int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])
        total: Tensor | float = 0.0
        for units in torch.split(torch.eye(width, device=self.device), 256):
            total = total + self.apply(units).float().square().sum(0)
        return cast("Tensor", total)

    @property
    def layer(self) -> nn.Module:
        """The frozen base layer, to be read; what it computes is :meth:`forward`."""
        return self._slot.layer

    def forward(self, *args: Any) -> Any:
        """What the base layer computes, bias included, without any adapter."""
        return self._slot.own(*args)

    @property
    def device(self) -> torch.device:
        """Where the base layer lives."""
        return self._slot.device


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
