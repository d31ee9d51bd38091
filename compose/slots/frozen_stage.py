"""A stage none of whose adapters trains, laid out for its calls on a base layer.

What does not depend on x is computed once: gains, biases with what a gain must leave alone taken out, the factors of
the rows that have some. A call is then the layer, at most one pass for gain and bias, and the products, each for the
rows that use it: what an adapter is cannot reach another's row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from compose.atoms import Block, Function, Moved
from compose.base.weights import bias_of
from compose.kernels.coefficients import Coefficient, weight_matrix
from compose.kernels.low_rank import LowRankMixture, add_rows, expand, fold
from compose.slots.block_functions import Blocks
from compose.slots.stage import Entry, Node, Stage

_FEW = 8  # rows an adapter has at most for its factors to be read once a row


def frozen_stage(program: Node | None) -> FrozenStage | None:
    """``program`` laid out, if it is a stage in which nothing trains, is a whole module or is weighed by token."""
    if not isinstance(program, Stage) or not program.keeps:
        return None
    cannot = any(
        e.atoms.dropout
        or (isinstance(e.coefficient, Tensor) and e.coefficient.dim() > 1)
        or not isinstance(e.atoms.function, Function | Moved | None)
        for e in program.entries
    )
    return None if cannot else FrozenStage(program)


class FrozenStage:
    """A stage laid out for its calls on one layer, once for each dtype of activations; see :func:`frozen_stage`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._layouts: dict[torch.dtype, FrozenLayout] = {}

    def on(self, layer: nn.Module, like: Tensor) -> FrozenLayout:
        """What calls of ``layer`` on activations such as ``like`` compute."""
        layout = self._layouts.get(like.dtype)
        if layout is None:
            with torch.inference_mode(False):  # what is kept may meet autograd in a later call
                layout = self._layouts[like.dtype] = FrozenLayout(self._stage, layer, like)
        return layout


class FrozenLayout:
    """The calls of ``stage`` on ``layer``, for activations such as ``like``."""

    def __init__(self, stage: Stage, layer: nn.Module, like: Tensor) -> None:
        def mixed(label: str, entries: Sequence[Entry], *, plus_one: bool = False) -> Tensor | None:
            return stage.mixture(label, entries, like, plus_one=plus_one) if entries else None

        bias, shift = bias_of(layer), mixed("biases", stage.biases)
        if bias is not None and stage.biasless:  # which a gain on W x must leave alone
            left_alone = -bias.detach() * stage.mixture("biasless", stage.biasless, like)
            shift = left_alone if shift is None else shift + left_alone
        self._input = _vectors(mixed("inputs", stage.inputs, plus_one=True), 1.0)
        self._gain = _vectors(mixed("gains", stage.gains, plus_one=True), 1.0)
        self._shift = _vectors(shift, 0.0)
        self._pairs: LowRankMixture | None = stage.layout_for(like) if stage.low_rank else None
        maps = stage.maps_for(like.dtype)
        self._terms = [Term(delta, e.coefficient, like) for e, delta in zip(stage.deltas, maps, strict=True)]
        self._terms += _of_functions(stage.functions, like)

    def __call__(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The layer's output for x (B, T, d_in) with the stage applied."""
        y = layer(x if self._input is None else self._input.times(x, own=False))
        terms = [term(x, y) for term in self._terms]  # before y changes, which they may read
        own = not y.requires_grad and y.is_contiguous()  # then nobody else holds it
        if self._gain is not None:
            y = self._gain.times(y, own=own)
        if self._shift is not None:
            y = self._shift.plus(y, own=own)
        if self._pairs is not None:
            y = self._pairs(y, x, fresh=own)
        for term, value in zip(self._terms, terms, strict=True):
            y = term.add(y, value, own=own)
        return y


class Vectors:
    """A vector for all rows of a batch, (1, d), or one for each, (R, d), of which some are ``neutral``.

    Where many are, only the others are read: beside a small step of decoding, R vectors are much to read.
    """

    def __init__(self, vectors: Tensor, neutral: float) -> None:
        self._count = len(vectors)
        self._rows: Tensor | None = None  # those that are not neutral, None: all
        self._value = vectors if len(vectors) == 1 else vectors[:, None]  # (n, 1, d)
        if len(vectors) > 1:
            rows = (vectors != neutral).any(1).nonzero().flatten()
            if 4 * len(rows) <= 3 * len(vectors):
                self._rows, self._value = rows, vectors[rows, None]

    def times(self, y: Tensor, *, own: bool) -> Tensor:
        """Each row of y (k R, T, d) times its vector; ``own``: y may be written over."""
        if self._rows is None:
            value = self._for(y)
            return y.mul_(value) if own else y * value
        folded = fold(y, self._count)
        scaled = folded.index_select(0, self._rows).mul_(self._value)
        return (folded.index_copy_ if own else folded.index_copy)(0, self._rows, scaled).view(y.shape)

    def plus(self, y: Tensor, *, own: bool) -> Tensor:
        """Each row of y (k R, T, d) plus its vector; ``own``: y may be written over."""
        if self._rows is None:
            value = self._for(y)
            return y.add_(value) if own else y + value
        folded = fold(y, self._count)
        value = self._value if folded.shape[1] == 1 else self._value.expand(-1, folded.shape[1], -1)
        return add_rows(y, self._rows, value, self._count, own=own)

    def _for(self, y: Tensor) -> Tensor:
        return self._value if self._count in (1, len(y)) else expand(self._value, len(y))


def _vectors(vectors: Tensor | None, neutral: float) -> Vectors | None:
    return None if vectors is None else Vectors(vectors, neutral)


class Term:
    """`w F(z)` for the rows that have a weight; z is the layer's input x, or what ``function`` reads."""

    def __init__(
        self, fn: Callable[[Tensor], Tensor], weight: Coefficient, like: Tensor, function: Function | None = None
    ) -> None:
        self._fn, self._function = fn, function
        self._count = 1  # rows told apart
        self._rows: Tensor | None = None  # those that have a weight, None: all
        self._weight = weight
        if isinstance(weight, Tensor):
            rows = weight.nonzero().flatten().to(like.device)
            kept = weight.to(like.device, like.dtype)[rows]
            self._count, self._rows = len(weight), rows
            self._weight = 1.0 if bool((kept == 1).all()) else kept[:, None, None]

    def __call__(self, x: Tensor, y0: Tensor) -> Tensor:
        """The rows that count, (n, T, d_out), for x (B, T, d_in) and the layer's output y0 (B, T, d_out)."""
        z = x if self._function is None else y0
        if self._function is not None and self._function.source is not None:
            z = self._function.source().reshape(*y0.shape[:-1], -1)
        if self._rows is not None:
            z = fold(z, self._count).index_select(0, self._rows)
        value = self._fn(z).to(y0.dtype)
        return value if isinstance(self._weight, float) and self._weight == 1.0 else value * self._weight

    def add(self, y: Tensor, value: Tensor, *, own: bool) -> Tensor:
        """`y` plus the term; ``own``: y may be written over."""
        if self._rows is None:
            return y.add_(value) if own else y + value
        return add_rows(y, self._rows, value, self._count, own=own and y.is_contiguous())


def _of_functions(entries: Sequence[Entry], like: Tensor) -> Iterator[Term]:
    """Terms of functions: blocks of one form that differ from row to row are computed side by side."""
    alike: dict[tuple[str | None, str], list[Entry]] = {}
    for e in entries:
        fn = e.atoms.function
        if isinstance(fn, Function) and isinstance(fn.fn, Block) and isinstance(e.coefficient, Tensor):
            alike.setdefault((fn.tap, fn.fn.activation), []).append(e)
    together = [group for group in alike.values() if _few_rows(group)]
    done = {id(e) for group in together for e in group}
    for group in together:
        functions = [cast("Function", e.atoms.function) for e in group]
        weights = weight_matrix([e.coefficient for e in group], like)  # (R, E)
        blocks = Blocks([cast("Block", f.fn) for f in functions], weights)
        yield Term(blocks, blocks.used, like, functions[0])
    for e in entries:
        if id(e) not in done:
            function = cast("Function | Moved", e.atoms.function)
            yield Term(function.fn, e.coefficient, like, function if isinstance(function, Function) else None)


def _few_rows(group: Sequence[Entry]) -> bool:
    used = sum(int((cast("Tensor", e.coefficient) != 0).sum()) for e in group)
    return len(group) > 1 and used <= _FEW * len(group)
