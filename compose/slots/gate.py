"""Experts at a site weighed by a gate that reads what enters it: routing per token (see :func:`compose.route`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from compose.errors import KindError
from compose.expr.tree import Expr
from compose.kernels.low_rank import Routed
from compose.kind.adapter import Adapter
from compose.slots.branches import Mix, once
from compose.slots.stage import Below, Node, Stage, State, pair_of


class Gate(Protocol):
    """Weights of E experts at a site from what enters it."""

    def __call__(self, path: str, x: Tensor) -> Tensor:
        """Weights (B or 1, T or 1, E) at the site ``path`` for x (B, T, d_in)."""


class Mixer(Protocol):
    """Mixes what the experts answer by reading the answers (AdapterFusion), so all of them are computed."""

    def mix(self, path: str, y: Tensor, deltas: Tensor) -> Tensor:
        """Output of the site from its own y (B, T, d_out) and each expert's change (B, T, E, d_out)."""


@dataclass(frozen=True)
class Routing:
    """Experts whose weights a gate computes at each site."""

    experts: tuple[Expr, ...]
    gate: Gate | Mixer


class GatedExperts:
    """Experts weighed by a gate that reads the site's input: `y0 + sum_e w_e(x) (f_e - y0)`.

    ``nodes`` are the experts in the gate's order, None where one does nothing at this site.
    """

    def __init__(self, path: str, gate: Gate | Mixer, nodes: Sequence[Node | None]) -> None:
        self.path, self.gate, self.nodes = path, gate, tuple(nodes)
        stages = [(i, n) for i, n in enumerate(nodes) if n is not None]
        self._flat = [(i, e) for i, n in stages if isinstance(n, Stage) for e in n.entries]
        self._side_by_side = all(isinstance(n, Stage) for _, n in stages)
        self._mixes = hasattr(gate, "mix")
        self.simple = not self._mixes and all(isinstance(n, Stage) and _only_pairs(n) for _, n in stages)
        self.inside = tuple(node for node in nodes if node is not None)
        self._routed: dict[torch.dtype, Routed] = {}

    def run(self, below: Below, x: Tensor) -> State:
        """Weigh the experts at x (B, T, d_in) and add them up."""
        if self._mixes:
            return self._mixed(once(below), x)
        if self.simple:
            y0, c0 = below(x)
            return State(self.add(y0, x), c0)
        w = self._weights(x)
        if self._side_by_side:
            return Stage([e.times(w[..., i]) for i, e in self._flat]).run(below, x)
        return Mix([(w[..., i], n) for i, n in enumerate(self.nodes) if n is not None]).run(below, x)

    def add(self, y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        """`y` plus the routed mixture of frozen pairs, laid out once; ``fresh``: y may be written over."""
        routed = self._routed.get(x.dtype)
        if routed is None:
            with torch.inference_mode(False):
                pairs = [pair_of(e, cast("float", e.coefficient), x.dtype, fold=True) for _, e in self._flat]
                routed = self._routed[x.dtype] = Routed(pairs)
        w = self._weights(x)
        owners = [i for i, _ in self._flat]
        if owners != list(range(w.shape[-1])):  # an expert of several pairs, or of none here
            w = w[..., owners]
        return routed(y, x, w, fresh=fresh)

    def _weights(self, x: Tensor) -> Tensor:
        w = cast("Gate", self.gate)(self.path, x)
        if w.dim() != 3 or w.shape[-1] != len(self.nodes):
            raise KindError(
                f"the gate at {self.path} gave weights of shape {tuple(w.shape)} for {len(self.nodes)} experts",
                hint="give (rows, tokens, experts)",
            )
        return w

    def _mixed(self, below: Below, x: Tensor) -> State:
        y0, c0 = below(x)
        deltas = [torch.zeros_like(y0) if n is None else n.run(below, x).y - y0 for n in self.nodes]
        return State(cast("Mixer", self.gate).mix(self.path, y0, torch.stack(deltas, dim=-2)), c0)


def _only_pairs(stage: Stage) -> bool:
    return stage.simple and not any(isinstance(e.coefficient, Tensor) for e in stage.entries)


def refuse_outside(adapter: Adapter) -> None:
    """A gate weighs what adapters do at linear layers; what they do elsewhere cannot be weighed by it."""
    reason = "carries whole modules" if adapter.saved else "puts a prompt before the text" if adapter.prompt() else ""
    if not reason and any(adapter.prefix(path) for path in adapter.paths):
        reason = "puts a prefix before the keys"
    if reason:
        raise KindError(
            f"{adapter.kind} adapter {adapter.name!r} {reason}, which no gate at a site can weigh",
            hint="choose it by row: compose.activate(model, [expression of each row])",
        )
