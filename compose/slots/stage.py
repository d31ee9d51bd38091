"""What a slot computes: stages of weighted atoms, chained (``>>``) or mixed (``c * (a >> b) + ...``).

A node maps the function below it to a new one. State (y, c): y is the site's whole output and c the part of it that
is not W x (the bias and what was added to it), which a gain that leaves the bias alone must not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.atoms import Atoms, Function, Moved, Replace, Side
from compose.errors import KindError
from compose.kernels.coefficients import Coefficient, multiply, on_rows, shield, used_rows, weigh, weight_matrix
from compose.kernels.low_rank import BACKENDS, LowRankMixture, Pair, choose, expand, for_all, isolating, mix
from compose.kernels.maps import LinearMap
from compose.kind.heads import level


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
        # By what they do, since each sort is computed in one go over its entries: one adapter may stand in several.
        self.low_rank = [e for e, a in atoms if a.A is not None]
        self.gains = [e for e, a in atoms if a.gain is not None]
        self.biasless = [e for e in self.gains if not e.atoms.gain_scales_bias]
        self.inputs = [e for e, a in atoms if a.input_gain is not None]
        self.biases = [e for e, a in atoms if a.bias is not None]
        self.deltas = [e for e, a in atoms if a.delta is not None]
        # Whole modules apart from other functions: a head takes the place of the layer, it is not added to it.
        self.heads = [e for e, a in atoms if isinstance(a.function, Replace)]
        self.functions = [e for e, a in atoms if a.function is not None and not isinstance(a.function, Replace)]
        self.live = any(e.live for e in self.entries)
        # What is kept from call to call must hold no graph: of live factors, or of weights that a router learns.
        self.keeps = not self.live and not any(
            isinstance(e.coefficient, Tensor) and e.coefficient.requires_grad for e in self.entries
        )
        # Nothing but frozen pairs, the common case: `y + sum_e w_e s_e B_e A_e x`, see :meth:`add`.
        self.simple = self.keeps and all(e.atoms.is_pair and not e.atoms.dropout for e in self.entries)
        # One adapter that trains alone, the common case of training: the slot has cheaper ways than :meth:`run`.
        self.moves = self._moves()
        self.learns = self._learns()
        # What does not depend on x, laid out at the first call of a dtype and read by all the others.
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._prepared: dict[torch.dtype, LowRankMixture] = {}
        self._maps: dict[torch.dtype, list[LinearMap]] = {}

    def _moves(self) -> tuple[Mapping[str, Tensor], float] | None:
        """Deltas of parameters and their weight, where nothing else acts here and they train: see Slot."""
        if len(self.entries) != 1 or not self.live or isinstance(self.entries[0].coefficient, Tensor):
            return None
        deltas = self.entries[0].atoms.shift
        return None if deltas is None else (deltas, self.entries[0].coefficient)

    def _learns(self) -> tuple[Atoms, float] | None:
        """The pair that trains here, and its weight, where nothing else acts: see Slot."""
        if len(self.entries) != 1 or not self.live or isinstance(self.entries[0].coefficient, Tensor):
            return None
        return (self.entries[0].atoms, self.entries[0].coefficient) if self.entries[0].atoms.is_pair else None

    @property
    def additive(self) -> bool:
        """Whether no entry reads or scales what is below."""
        return all(e.atoms.additive for e in self.entries)

    def run(self, below: Below, x: Tensor) -> State:
        """`y = y0 (1 + G) + low rank + deltas + biases + functions`; see :mod:`compose.atoms`."""
        if (whole := self._replacement()) is not None:
            return State(whole.fn(x), None)  # what is below does not matter: do not compute it
        for e in self.heads:
            if (told := cast("Replace", e.atoms.function).alone) is not None:
                raise KindError(f"adapter {e.name!r} {told}", hint="activate it alone, and for the whole batch")
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
        for e, delta in zip(self.deltas, self.maps_for(x.dtype) if self.deltas else (), strict=True):
            y = y + _apply_map(delta, e.coefficient, x, y0)
        added: Tensor | None = self._mixed("biases", self.biases, y0) if self.biases else None
        for e in self.functions:
            term = self._call(e, x, y0)
            added = term if added is None else added + term
        if added is not None:
            y, c = y + added, added if c is None else c + added
        return self._with_heads(State(y, c), x, y0) if self.heads else State(y, c)

    def _with_heads(self, state: State, x: Tensor, y0: Tensor) -> State:
        """`y + sum_e w_e (M_e(x) - y0)`, in an order of operations in which `w_e = 1` leaves `M_e(x)` as it is.

        Heads may differ in width, see :func:`compose.kind.heads.level`.
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

    def maps_for(self, dtype: torch.dtype) -> list[LinearMap]:
        """The deltas, in order, the frozen ones in ``dtype``."""
        if dtype not in self._maps:
            with self._to_keep():
                own = [cast("LinearMap", e.atoms.delta) for e in self.deltas]
                self._maps[dtype] = [m if e.live else m.to(dtype) for e, m in zip(self.deltas, own, strict=True)]
        return self._maps[dtype]

    def lay_out(self, like: Tensor) -> None:
        """Do now what else the first call on activations such as ``like`` does, so that calls are all the same."""
        if not self.keeps:
            return
        if self.low_rank and not any(e.atoms.dropout for e in self.low_rank):
            self.layout_for(like)
        scaling = [e for e in self.gains if e.atoms.gain_scales_bias]
        plain = {"biasless": self.biasless, "biases": self.biases}
        for label, entries in {"inputs": self.inputs, "gains": self.gains, "scaling": scaling, **plain}.items():
            if entries:
                self._kept_mixture(label, entries, like, plus_one=label not in plain)
        if self.deltas:
            self.maps_for(like.dtype)

    def _replacement(self) -> Replace | None:
        if len(self.heads) != 1 or len(self.entries) != 1 or isinstance(self.entries[0].coefficient, Tensor):
            return None
        return cast("Replace", self.heads[0].atoms.function) if self.entries[0].coefficient == 1.0 else None

    def _mixed(self, label: str, entries: Sequence[Entry], like: Tensor, *, plus_one: bool = False) -> Tensor:
        """`sum_e w_e t_e` over vectors t (gains enter as g - 1): (d,) for numbers, else (B, 1 or T, d)."""
        mixed = self._kept_mixture(label, entries, like, plus_one=plus_one)
        if mixed.shape[0] == 1 and mixed.dim() == 2:
            return mixed[0]
        mixed = expand(mixed, like.shape[0])
        return mixed[:, None] if mixed.dim() == 2 else mixed

    def mixture(self, label: str, entries: Sequence[Entry], like: Tensor, *, plus_one: bool = False) -> Tensor:
        """`sum_e w_e t_e` over vectors t (gains enter as g - 1), (1 or R, [T,] d)."""
        vectors = torch.stack([_vector(label, e.atoms) for e in entries])  # (E, d)
        mixed = mix(weight_matrix([e.coefficient for e in entries], like), vectors).to(like.dtype)
        return mixed + 1 if plus_one else mixed

    def _kept_mixture(self, label: str, entries: Sequence[Entry], like: Tensor, *, plus_one: bool) -> Tensor:
        tag = (label, like.dtype)
        if tag in self._kept:
            return self._kept[tag]
        with self._to_keep():
            mixed = self.mixture(label, entries, like, plus_one=plus_one)
        if self.keeps:
            self._kept[tag] = mixed
        return mixed

    def _add_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        if any(e.atoms.dropout for e in self.low_rank):
            return self._add_with_dropout(y, x)
        if not self.keeps:
            # While training, factors keep their own precision; afterwards they take the activations'.
            own = [cast("Tensor", e.atoms.A).dtype for e in self.low_rank] if self.live else []
            dtype = reduce(torch.promote_types, own, x.dtype)
            return self._prepare(dtype, x)(y.to(dtype), x.to(dtype)).to(y.dtype)
        return self.add(y, x)

    def add(self, y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        """`y` plus the low-rank mixture of frozen factors, laid out once; ``fresh``: y may be written over."""
        return self.layout_for(x)(y, x, fresh=fresh)

    def layout_for(self, x: Tensor) -> LowRankMixture:
        """The low-rank mixture of frozen factors for activations such as ``x``."""
        prepared = self._prepared.get(x.dtype)
        if prepared is None:
            with self._to_keep():
                prepared = self._prepared[x.dtype] = self._prepare(x.dtype, x)
        return prepared

    def _to_keep(self) -> AbstractContextManager[Any]:
        """Tensors that are kept must not be of inference mode: autograd may meet them in a later call."""
        return torch.inference_mode(False) if self.keeps else nullcontext()

    def _prepare(self, dtype: torch.dtype, like: Tensor) -> LowRankMixture:
        numbers = [e.coefficient for e in self.low_rank if not isinstance(e.coefficient, Tensor)]
        if len(numbers) == len(self.low_rank):
            return for_all([pair_of(e, c, dtype, fold=self.keeps) for e, c in zip(self.low_rank, numbers, strict=True)])
        pairs = [pair_of(e, 1.0, dtype, fold=self.keeps) for e in self.low_rank]
        w = weight_matrix([e.coefficient for e in self.low_rank], like)
        if self.keeps and len(used := (w != 0).flatten(0, -2).any(0).nonzero().flatten()):
            pairs, w = [pairs[i] for i in used.tolist()], w[..., used]  # a weight of zero costs nothing
        return BACKENDS[isolating(choose([p.rank for p in pairs], w), pairs, w, live=self.live)](pairs, w)

    def _add_with_dropout(self, y: Tensor, x: Tensor) -> Tensor:
        for e in self.low_rank:
            a, b = cast("Tensor", e.atoms.A), cast("Tensor", e.atoms.B)
            w, rows = used_rows(e.coefficient, x.shape[0])
            dropped = F.dropout(shield(x, w), e.atoms.dropout).to(a.dtype)
            pair = partial(_pair_on, a, b, e.atoms.scale)
            y = y + weigh(on_rows(pair, rows, dropped, y), w)
        return y

    def _call(self, entry: Entry, x: Tensor, y0: Tensor) -> Tensor:
        """`w F`, computed only for the rows whose weight is not zero."""
        function = entry.atoms.function
        w, rows = used_rows(entry.coefficient, x.shape[0])
        if isinstance(function, Side):  # for all rows: what it keeps for later tokens lies side by side in one cache
            return weigh(function.fn(shield(y0, w), function.trace()).to(y0.dtype), entry.coefficient)
        if isinstance(function, Moved):
            value = on_rows(lambda x_, y_: function.fn(x_).to(y_.dtype), rows, shield(x, w), y0)
        else:
            assert isinstance(function, Function)  # noqa: S101 - narrows the type
            z = y0 if function.source is None else function.source().reshape(*y0.shape[:-1], -1)
            value = on_rows(lambda z_, y_: function.fn(z_).to(y_.dtype), rows, shield(z, w), y0)
        return weigh(value, w)


def _pair_on(a: Tensor, b: Tensor, scale: float, x: Tensor, like: Tensor) -> Tensor:
    return (F.linear(F.linear(x, a), b) * scale).to(like.dtype)


def pair_of(entry: Entry, times: float, dtype: torch.dtype, *, fold: bool) -> Pair:
    """Factors in ``dtype`` with a scale; ``fold`` puts it into B while B has its own precision, to round only once.

    Live factors are left as they are.
    """
    a, b, scale = cast("Tensor", entry.atoms.A), cast("Tensor", entry.atoms.B), entry.atoms.scale * times
    if fold and scale != 1.0:
        b, scale = b * scale, 1.0
    return Pair(a.to(dtype), b.to(dtype), scale)


def _apply_map(delta: LinearMap, coefficient: Coefficient, x: Tensor, like: Tensor) -> Tensor:
    """`w D x`, computed only for the rows whose weight is not zero."""
    w, rows = used_rows(coefficient, x.shape[0])
    return weigh(on_rows(lambda x_, y_: delta(x_).to(y_.dtype), rows, shield(x, w), like), w)


def _vector(label: str, atoms: Atoms) -> Tensor:
    value = {"biases": atoms.bias, "inputs": atoms.input_gain}.get(label, atoms.gain)
    assert value is not None  # noqa: S101 - the caller chose entries that have it
    return value if label == "biases" else value - 1
