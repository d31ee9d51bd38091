"""What a slot computes: stages of weighted atoms, chained (``>>``) or mixed (``c * (a >> b) + ...``).

A node maps the function below it to a new one. State (y, c): y is the site's whole output and c the part of it that
is not W x (the bias and what was added to it), which a gain that leaves the bias alone must not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.atoms import Atoms, Function, Moved, Replace, Side
from compose.coefficients import Coefficient, multiply, on_rows, used_rows, weigh, weight_matrix
from compose.heads import level
from compose.kernels import BACKENDS, Pair, Prepared, choose, expand, for_all, isolating, mix
from compose.maps import LinearMap


class State(NamedTuple):
    """Output y of a site and its part c outside W x (None: nothing)."""

    y: Tensor
    c: Tensor | None


Below = Callable[[Tensor], State]


class Node(Protocol):
    """A function on the function below."""

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate at x (B, T, d_in)."""


@dataclass(frozen=True)
class Entry:
    """One adapter's atoms in a stage. ``key`` says when two entries are the same; ``live`` when they still train."""

    name: str
    key: str
    atoms: Atoms
    coefficient: Coefficient
    live: bool

    def times(self, c: Coefficient) -> Entry:
        """The same entry with its coefficient multiplied."""
        return replace(self, coefficient=multiply(self.coefficient, c))


class Stage:
    """Entries that act side by side on the same function below (``+``)."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        atoms = [(e, e.atoms) for e in self.entries]
        self.low_rank = [e for e, a in atoms if a.A is not None]
        self.gains = [e for e, a in atoms if a.gain is not None]
        self.biasless = [e for e in self.gains if not e.atoms.gain_scales_bias]
        self.inputs = [e for e, a in atoms if a.input_gain is not None]
        self.biases = [e for e, a in atoms if a.bias is not None]
        self.deltas = [e for e, a in atoms if a.delta is not None]
        self.heads = [e for e, a in atoms if isinstance(a.function, Replace)]
        self.functions = [e for e, a in atoms if a.function is not None and not isinstance(a.function, Replace)]
        self.live = any(e.live for e in self.entries)
        # What is kept from call to call must hold no graph: of live factors, or of weights that a router learns.
        self._keeps = not self.live and not any(
            isinstance(e.coefficient, Tensor) and e.coefficient.requires_grad for e in self.entries
        )
        # Nothing but frozen pairs, the common case: y + sum_e w_e s_e B_e A_e x, see :meth:`add`.
        self.simple = self._keeps and all(e.atoms.is_pair and not e.atoms.dropout for e in self.entries)
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._prepared: dict[torch.dtype, Prepared] = {}
        self._maps: dict[torch.dtype, list[LinearMap]] = {}

    @property
    def additive(self) -> bool:
        """Whether no entry reads or scales what is below."""
        return all(e.atoms.additive for e in self.entries)

    def run(self, below: Below, x: Tensor) -> State:
        """Y = y0 (1 + G) + low rank + deltas + biases + functions; see :mod:`compose.atoms`."""
        if (whole := self._replacement()) is not None:
            return State(whole.fn(x), None)  # what is below does not matter: do not compute it
        y0, c0 = below(x * self._mixed("inputs", self.inputs, x, plus_one=True) if self.inputs else x)
        y, c = y0, c0
        if self.gains:
            y = y0 * self._mixed("gains", self.gains, y0, plus_one=True)
            if self.biasless and c0 is not None:
                y = y - c0 * self._mixed("biasless", self.biasless, y0)
            scaling = [e for e in self.gains if e.atoms.gain_scales_bias]
            c = c0 * self._mixed("scaling", scaling, y0, plus_one=True) if scaling and c0 is not None else c0
        if self.low_rank:
            y = self._add_low_rank(y, x)
        for e, delta in zip(self.deltas, self._maps_for(x.dtype) if self.deltas else (), strict=True):
            y = y + _apply_map(delta, e.coefficient, x, y0)
        added: Tensor | None = self._mixed("biases", self.biases, y0) if self.biases else None
        for e in self.functions:
            term = self._call(e, x, y0)
            added = term if added is None else added + term
        if added is not None:
            y, c = y + added, added if c is None else c + added
        return self._with_heads(State(y, c), x, y0) if self.heads else State(y, c)

    def _with_heads(self, state: State, x: Tensor, y0: Tensor) -> State:
        """Y + sum_e w_e (M_e(x) - y0), in an order of operations in which w_e = 1 leaves M_e(x) as it is.

        Heads may differ in width, see :func:`compose.heads.level`.
        """
        y, c = state
        for e in self.heads:
            w, rows = used_rows(e.coefficient, x.shape[0])
            whole = cast("Replace", e.atoms.function).fn(x if rows is None else x[rows]).to(y.dtype)
            y, whole = level(y, whole)
            before, _ = level(y0, whole)
            value = whole if rows is None else torch.zeros_like(before).index_copy(0, rows, whole)
            moved = y - weigh(before, w) + weigh(value, w)
            if y.shape == y0.shape:
                c = moved - y if c is None else c + (moved - y)
            y = moved
        return State(y, c)

    def _maps_for(self, dtype: torch.dtype) -> list[LinearMap]:
        """The deltas, in order, the frozen ones in ``dtype``."""
        if dtype not in self._maps:
            with self._to_keep():
                own = [cast("LinearMap", e.atoms.delta) for e in self.deltas]
                self._maps[dtype] = [m if e.live else m.to(dtype) for e, m in zip(self.deltas, own, strict=True)]
        return self._maps[dtype]

    def lay_out(self, like: Tensor) -> None:
        """Do now what else the first call on activations such as ``like`` does, so that calls are all the same."""
        if not self._keeps:
            return
        if self.low_rank and not any(e.atoms.dropout for e in self.low_rank):
            self._layout_for(like)
        for label, entries, one in (("inputs", self.inputs, True), ("gains", self.gains, True)):
            if entries:
                self._mixture(label, entries, like, plus_one=one)
        if self.gains:
            scaling = [e for e in self.gains if e.atoms.gain_scales_bias]
            for label, entries, one in (("biasless", self.biasless, False), ("scaling", scaling, True)):
                if entries:
                    self._mixture(label, entries, like, plus_one=one)
        if self.biases:
            self._mixture("biases", self.biases, like, plus_one=False)
        if self.deltas:
            self._maps_for(like.dtype)

    def _replacement(self) -> Replace | None:
        if len(self.heads) != 1 or len(self.entries) != 1 or isinstance(self.entries[0].coefficient, Tensor):
            return None
        return cast("Replace", self.heads[0].atoms.function) if self.entries[0].coefficient == 1.0 else None

    def _mixed(self, label: str, entries: Sequence[Entry], like: Tensor, *, plus_one: bool = False) -> Tensor:
        """Sum_e w_e t_e over vectors t (gains enter as g - 1): (d,) for numbers, else (B, 1 or T, d)."""
        mixed = self._mixture(label, entries, like, plus_one=plus_one)
        if mixed.shape[0] == 1 and mixed.dim() == 2:
            return mixed[0]
        mixed = expand(mixed, like.shape[0])
        return mixed[:, None] if mixed.dim() == 2 else mixed

    def _mixture(self, label: str, entries: Sequence[Entry], like: Tensor, *, plus_one: bool) -> Tensor:
        tag = (label, like.dtype)
        if tag in self._kept:
            return self._kept[tag]
        with self._to_keep():
            vectors = torch.stack([_vector(label, e.atoms) for e in entries])  # (E, d)
            mixed = mix(weight_matrix([e.coefficient for e in entries], like), vectors).to(like.dtype)  # (R, [T,] d)
            mixed = mixed + 1 if plus_one else mixed
        if self._keeps:
            self._kept[tag] = mixed
        return mixed

    def _add_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        if any(e.atoms.dropout for e in self.low_rank):
            return self._add_with_dropout(y, x)
        if not self._keeps:
            # While training, factors keep their own precision; afterwards they take the activations'.
            own = [cast("Tensor", e.atoms.A).dtype for e in self.low_rank] if self.live else []
            dtype = reduce(torch.promote_types, own, x.dtype)
            return self._prepare(dtype, x)(y.to(dtype), x.to(dtype)).to(y.dtype)
        return self.add(y, x)

    def add(self, y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        """Y plus the low-rank mixture of frozen factors, laid out once; ``fresh``: y may be written over."""
        return self._layout_for(x)(y, x, fresh=fresh)

    def _layout_for(self, x: Tensor) -> Prepared:
        prepared = self._prepared.get(x.dtype)
        if prepared is None:
            with self._to_keep():
                prepared = self._prepared[x.dtype] = self._prepare(x.dtype, x)
        return prepared

    def _to_keep(self) -> AbstractContextManager[Any]:
        """Tensors that are kept must not be of inference mode: autograd may meet them in a later call."""
        return torch.inference_mode(False) if self._keeps else nullcontext()

    def _prepare(self, dtype: torch.dtype, like: Tensor) -> Prepared:
        numbers = [e.coefficient for e in self.low_rank if not isinstance(e.coefficient, Tensor)]
        if len(numbers) == len(self.low_rank):
            return for_all(
                [pair_of(e, c, dtype, fold=self._keeps) for e, c in zip(self.low_rank, numbers, strict=True)]
            )
        pairs = [pair_of(e, 1.0, dtype, fold=self._keeps) for e in self.low_rank]
        w = weight_matrix([e.coefficient for e in self.low_rank], like)
        if self._keeps and len(used := (w != 0).flatten(0, -2).any(0).nonzero().flatten()):
            pairs, w = [pairs[i] for i in used.tolist()], w[..., used]  # a weight of zero costs nothing
        return BACKENDS[isolating(choose([p.rank for p in pairs], w), pairs, w)](pairs, w)

    def _add_with_dropout(self, y: Tensor, x: Tensor) -> Tensor:
        for e in self.low_rank:
            a, b = cast("Tensor", e.atoms.A), cast("Tensor", e.atoms.B)
            dropped = F.dropout(x, e.atoms.dropout).to(a.dtype)
            term = weigh(F.linear(F.linear(dropped, a), b) * e.atoms.scale, e.coefficient)
            y = y + term.to(y.dtype)
        return y

    def _call(self, entry: Entry, x: Tensor, y0: Tensor) -> Tensor:
        """W F, computed only for the rows whose weight is not zero."""
        function = entry.atoms.function
        w, rows = used_rows(entry.coefficient, x.shape[0])
        if isinstance(function, Side):  # for all rows: what it keeps for later tokens lies side by side in one cache
            return weigh(function.fn(y0, function.trace).to(y0.dtype), entry.coefficient)
        if isinstance(function, Moved):
            value = on_rows(lambda x_, y_: function.fn(x_).to(y_.dtype), rows, x, y0)
        else:
            assert isinstance(function, Function)  # noqa: S101 - narrows the type
            z = y0 if function.source is None else function.source().reshape(*y0.shape[:-1], -1)
            value = on_rows(lambda z_, y_: function.fn(z_).to(y_.dtype), rows, z, y0)
        return weigh(value, w)


def pair_of(entry: Entry, times: float, dtype: torch.dtype, *, fold: bool) -> Pair:
    """Factors in ``dtype`` with a scale; ``fold`` puts it into B while B has its own precision, to round only once.

    Live factors are left as they are.
    """
    a, b, scale = cast("Tensor", entry.atoms.A), cast("Tensor", entry.atoms.B), entry.atoms.scale * times
    return Pair(a.to(dtype), (b * scale).to(dtype), 1.0) if fold else Pair(a.to(dtype), b.to(dtype), scale)


def _apply_map(delta: LinearMap, coefficient: Coefficient, x: Tensor, like: Tensor) -> Tensor:
    """W D x, computed only for the rows whose weight is not zero."""
    w, rows = used_rows(coefficient, x.shape[0])
    return weigh(on_rows(lambda x_, y_: delta(x_).to(y_.dtype), rows, x, like), w)


def _vector(label: str, atoms: Atoms) -> Tensor:
    value = {"biases": atoms.bias, "inputs": atoms.input_gain}.get(label, atoms.gain)
    assert value is not None  # noqa: S101 - the caller chose entries that have it
    return value if label == "biases" else value - 1


class Chain:
    """Stages one after the other (``>>``): each works on the function that the ones before it made."""

    def __init__(self, parts: Sequence[Node]) -> None:
        self.parts = tuple(parts)

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate the last stage on all the others."""
        for part in self.parts[:-1]:
            below = partial(part.run, once(below))
        return self.parts[-1].run(once(below), x)


class Mix:
    """y0 + sum_i c_i (f_i - y0): whole branches, each relative to the same function below."""

    def __init__(self, terms: Sequence[tuple[Coefficient, Node]]) -> None:
        self.terms = tuple(terms)

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate every branch; what is below is evaluated once."""
        below = once(below)
        y0, c0 = below(x)
        y, c = y0, c0
        for weight, node in self.terms:
            yi, ci = node.run(below, x)
            if yi.shape == y.shape:
                y = y + weigh(yi - y0, weight)
            else:  # heads of different widths: an order in which a weight of one leaves yi as it is
                y, yi = level(y, yi)
                before, _ = level(y0, yi)
                y = y - weigh(before, weight) + weigh(yi, weight)
            if ci is not None and ci.shape[-1] == y0.shape[-1]:
                delta = weigh(torch.broadcast_to(ci if c0 is None else ci - c0, y0.shape), weight)
                c = delta if c is None else c + delta
        return State(y, c)


def stages(node: Node | None) -> list[Stage]:
    """All stages of a compiled node."""
    if isinstance(node, Stage):
        return [node]
    parts = node.parts if isinstance(node, Chain) else [n for _, n in node.terms] if isinstance(node, Mix) else []
    return [stage for part in parts for stage in stages(part)]


def weighs_rows(node: Node) -> bool:
    """Whether some weight in ``node`` is a tensor: one per row or per token."""
    if isinstance(node, Stage):
        return any(isinstance(e.coefficient, Tensor) for e in node.entries)
    if isinstance(node, Chain):
        return any(weighs_rows(part) for part in node.parts)
    return isinstance(node, Mix) and any(isinstance(c, Tensor) or weighs_rows(n) for c, n in node.terms)


def once(below: Below) -> Below:
    """Remember the last evaluation: branches ask for the same x."""
    last: list[tuple[Tensor, State]] = []

    def call(x: Tensor) -> State:
        if not last or last[0][0] is not x:
            last[:] = [(x, below(x))]
        return last[0][1]

    return call
