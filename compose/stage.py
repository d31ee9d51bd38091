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

from compose.atoms import Atoms, Function, Replace
from compose.kernels import BACKENDS, Pair, Prepared, choose, expand, for_all

Coefficient = float | Tensor  # a number, or (R,) per row, or (R, T) per token


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


def multiply(a: Coefficient, b: Coefficient) -> Coefficient:
    """Product of coefficients: rows against tokens broadcast as (R,) -> (R, 1)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() != b.dim():
        a, b = (a[:, None], b) if a.dim() < b.dim() else (a, b[:, None])
    return a * b


def weight_matrix(entries: Sequence[Entry], like: Tensor) -> Tensor:
    """Coefficients side by side: (R, E) or, if any is per token, (R, T, E). All-number stages give (1, E)."""
    tensors = [e.coefficient for e in entries if isinstance(e.coefficient, Tensor)]
    shape = max((t.shape for t in tensors), key=len, default=torch.Size([1]))
    columns = []
    for e in entries:
        c = e.coefficient
        if isinstance(c, Tensor):
            c = c[:, None] if c.dim() < len(shape) else c
            columns.append(c.to(like.device, torch.float32).expand(shape))
        else:
            columns.append(torch.full(shape, float(c), device=like.device))
    return torch.stack(columns, dim=-1)


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
        self.functions = [e for e, a in atoms if a.function is not None]
        self.live = any(e.live for e in self.entries)
        # What is kept from call to call must hold no graph: of live factors, or of weights that a router learns.
        self._keeps = not self.live and not any(
            isinstance(e.coefficient, Tensor) and e.coefficient.requires_grad for e in self.entries
        )
        # Nothing but frozen pairs, the common case: y + sum_e w_e s_e B_e A_e x, see :meth:`add`.
        self.simple = self._keeps and all(e.atoms.is_pair and not e.atoms.dropout for e in self.entries)
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._prepared: dict[torch.dtype, Prepared] = {}

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
        for e in self.deltas:
            assert e.atoms.delta is not None  # noqa: S101 - narrows the type
            y = y + weigh(F.linear(x, e.atoms.delta.to(x.dtype)), e.coefficient)
        added: Tensor | None = self._mixed("biases", self.biases, y0) if self.biases else None
        for e in self.functions:
            term = self._call(e, x, y0)
            added = term if added is None else added + term
        if added is None:
            return State(y, c)
        return State(y + added, added if c is None else c + added)

    def _replacement(self) -> Replace | None:
        if len(self.functions) == len(self.entries) == 1 and not isinstance(self.entries[0].coefficient, Tensor):
            function = self.functions[0].atoms.function
            return function if isinstance(function, Replace) and self.entries[0].coefficient == 1.0 else None
        return None

    def _mixed(self, label: str, entries: Sequence[Entry], like: Tensor, *, plus_one: bool = False) -> Tensor:
        """Sum_e w_e t_e over vectors t (gains enter as g - 1): (d,) for numbers, else (B, 1 or T, d)."""
        tag = (label, like.dtype)
        if tag in self._kept:
            mixed = self._kept[tag]
        else:
            with self._to_keep():
                vectors = torch.stack([_vector(label, e.atoms) for e in entries])  # (E, d)
                w = weight_matrix(entries, like)
                mixed = (w.to(vectors.dtype) @ vectors).to(like.dtype)  # (R, [T,] d)
                mixed = mixed + 1 if plus_one else mixed
            if self._keeps:
                self._kept[tag] = mixed
        if mixed.shape[0] == 1 and mixed.dim() == 2:
            return mixed[0]
        mixed = expand(mixed, like.shape[0])
        return mixed[:, None] if mixed.dim() == 2 else mixed

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
        prepared = self._prepared.get(x.dtype)
        if prepared is None:
            with self._to_keep():
                prepared = self._prepared[x.dtype] = self._prepare(x.dtype, x)
        return prepared(y, x, fresh=fresh)

    def _to_keep(self) -> AbstractContextManager[Any]:
        """Tensors that are kept must not be of inference mode: autograd may meet them in a later call."""
        return torch.inference_mode(False) if self._keeps else nullcontext()

    def _prepare(self, dtype: torch.dtype, like: Tensor) -> Prepared:
        numbers = [e.coefficient for e in self.low_rank if not isinstance(e.coefficient, Tensor)]
        if len(numbers) == len(self.low_rank):
            return for_all([_pair(e, c, dtype, fold=self._keeps) for e, c in zip(self.low_rank, numbers, strict=True)])
        pairs = [_pair(e, 1.0, dtype, fold=self._keeps) for e in self.low_rank]
        w = weight_matrix(self.low_rank, like)
        if self._keeps and len(used := (w != 0).flatten(0, -2).any(0).nonzero().flatten()):
            pairs, w = [pairs[i] for i in used.tolist()], w[..., used]  # a weight of zero costs nothing
        return BACKENDS[choose([p.rank for p in pairs], w)](pairs, w)

    def _add_with_dropout(self, y: Tensor, x: Tensor) -> Tensor:
        for e in self.low_rank:
            a, b = cast("Tensor", e.atoms.A), cast("Tensor", e.atoms.B)
            dropped = F.dropout(x, e.atoms.dropout).to(a.dtype)
            term = weigh(F.linear(F.linear(dropped, a), b) * e.atoms.scale, e.coefficient)
            y = y + term.to(y.dtype)
        return y

    def _call(self, entry: Entry, x: Tensor, y0: Tensor) -> Tensor:
        """W F, computed only for the rows whose weight is not zero."""
        function, w = entry.atoms.function, entry.coefficient
        rows: Tensor | None = None
        if isinstance(w, Tensor) and w.dim() == 1 and not entry.live and not w.requires_grad:
            w = expand(w, x.shape[0])
            rows = w.nonzero().squeeze(1)
        if isinstance(function, Replace):
            value = _on_rows(lambda x_, y_: function.fn(x_).to(y_.dtype) - y_, rows, x, y0)
        else:
            assert isinstance(function, Function)  # noqa: S101 - narrows the type
            z = y0 if function.source is None else function.source().reshape(*y0.shape[:-1], -1)
            value = _on_rows(lambda z_, y_: function.fn(z_).to(y_.dtype), rows, z, y0)
        return weigh(value, w)


def _pair(entry: Entry, times: float, dtype: torch.dtype, *, fold: bool) -> Pair:
    """Factors in ``dtype`` with a scale; ``fold`` puts it into B while B has its own precision, to round only once.

    Live factors are left as they are.
    """
    a, b, scale = cast("Tensor", entry.atoms.A), cast("Tensor", entry.atoms.B), entry.atoms.scale * times
    return Pair(a.to(dtype), (b * scale).to(dtype), 1.0) if fold else Pair(a.to(dtype), b.to(dtype), scale)


def _on_rows(fn: Callable[[Tensor, Tensor], Tensor], rows: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    if rows is None:
        return fn(x, y)
    out = torch.zeros_like(y)
    if len(rows):
        out[rows] = fn(x[rows], y[rows])
    return out


def _vector(label: str, atoms: Atoms) -> Tensor:
    value = {"biases": atoms.bias, "inputs": atoms.input_gain}.get(label, atoms.gain)
    assert value is not None  # noqa: S101 - the caller chose entries that have it
    return value if label == "biases" else value - 1


def weigh(term: Tensor, c: Coefficient) -> Tensor:
    """C times a term (B, T, d) or (B, d), for c a number, (R,) or (R, T)."""
    if not isinstance(c, Tensor):
        return term if c == 1.0 else term * c
    c = expand(c.to(term.device, term.dtype), term.shape[0])
    return term * c.reshape(*c.shape, *([1] * (term.dim() - c.dim())))


class Chain:
    """Stages one after the other (``>>``): each works on the function that the ones before it made."""

    def __init__(self, parts: Sequence[Node]) -> None:
        self.parts = tuple(parts)

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate the last stage on all the others."""
        for part in self.parts[:-1]:
            below = partial(part.run, _once(below))
        return self.parts[-1].run(_once(below), x)


class Mix:
    """y0 + sum_i c_i (f_i - y0): whole branches, each relative to the same function below."""

    def __init__(self, terms: Sequence[tuple[Coefficient, Node]]) -> None:
        self.terms = tuple(terms)

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate every branch; what is below is evaluated once."""
        below = _once(below)
        y0, c0 = below(x)
        y, c = y0, c0
        for weight, node in self.terms:
            yi, ci = node.run(below, x)
            y = y + weigh(yi - y0, weight)
            if ci is not None:
                delta = weigh(torch.broadcast_to(ci if c0 is None else ci - c0, y0.shape), weight)
                c = delta if c is None else c + delta
        return State(y, c)


def weighs_rows(node: Node) -> bool:
    """Whether some weight in ``node`` is a tensor: one per row or per token."""
    if isinstance(node, Stage):
        return any(isinstance(e.coefficient, Tensor) for e in node.entries)
    if isinstance(node, Chain):
        return any(weighs_rows(part) for part in node.parts)
    return isinstance(node, Mix) and any(isinstance(c, Tensor) or weighs_rows(n) for c, n in node.terms)


def _once(below: Below) -> Below:
    """Remember the last evaluation: branches ask for the same x."""
    last: list[tuple[Tensor, State]] = []

    def call(x: Tensor) -> State:
        if not last or last[0][0] is not x:
            last[:] = [(x, below(x))]
        return last[0][1]

    return call
