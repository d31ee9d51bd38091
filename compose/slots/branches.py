"""How stages stand together: one after the other (``>>``), as a mixture of whole branches, or one for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compose.atoms import Function, Replace, Side
from compose.kernels.coefficients import Coefficient, shield, weigh
from compose.kernels.low_rank import expand
from compose.kind.heads import level
from compose.slots.stage import Below, Node, Stage, State


class Chain:
    """Stages one after the other (``>>``): each works on the function that the ones before it made."""

    def __init__(self, parts: Sequence[Node]) -> None:
        self.parts = self.inside = tuple(parts)

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate the last stage on all the others."""
        for part in self.parts[:-1]:
            below = partial(part.run, once(below))
        return self.parts[-1].run(once(below), x)


class Mix:
    """y0 + sum_i c_i (f_i - y0): whole branches, each relative to the same function below."""

    def __init__(self, terms: Sequence[tuple[Coefficient, Node]]) -> None:
        self.terms = tuple(terms)
        self.inside = tuple(node for _, node in terms)

    def run(self, below: Below, x: Tensor) -> State:
        """Evaluate every branch; what is below is evaluated once."""
        below = once(below)
        y0, c0 = below(x)
        y, c = y0, c0
        for weight, node in self.terms:
            yi, ci = node.run(*_shielded(below, x, weight))
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


class RowBranches:
    """An expression for each row: each branch computes those that are its own, and the others stay as they are below.

    ``terms``: (R,) which rows a branch has, and the branch. It stands on the bare layer.
    """

    def __init__(self, terms: Sequence[tuple[Tensor, Node]]) -> None:
        self.terms = tuple(terms)
        self.inside = tuple(node for _, node in terms)
        self._alone = [not weighs_rows(n) and not _reads_elsewhere(n) for _, n in self.terms]

    def run(self, below: Below, x: Tensor) -> State:
        """Put what each branch makes of its rows in their place."""
        y0, c0 = below(x)
        y = y0
        for (chosen, node), alone in zip(self.terms, self._alone, strict=True):
            rows = expand(chosen, x.shape[0]).nonzero().squeeze(1)
            yi = _on_own_rows(node, below, x, rows, State(y0, c0)) if alone else node.run(once(below), x).y[rows]
            y, yi = level(y, yi.to(y.dtype))
            y = y.index_copy(0, rows, yi)
        return State(y, None)


def _on_own_rows(node: Node, below: Below, x: Tensor, rows: Tensor, known: State) -> Tensor:
    own, y0 = x[rows], known.y[rows]
    return node.run(lambda z: State(y0, known.c) if z is own else below(z), own).y


def _reads_elsewhere(node: Node) -> bool:
    """Whether it reads more than this site's input, which is there for all rows."""
    functions = [e.atoms.function for stage in stages(node) for e in stage.functions]
    return any(isinstance(f, Side) or (isinstance(f, Function) and f.source is not None) for f in functions)


def _shielded(below: Below, x: Tensor, weight: Coefficient) -> tuple[Below, Tensor]:
    """What is below and x for a branch of this weight, see :func:`compose.kernels.coefficients.shield`."""
    own = shield(x, weight)
    if own is x:
        return below, x

    def under(z: Tensor) -> State:
        y, c = below(x if z is own else z)
        return State(shield(y, weight), c if c is None or c.dim() < y.dim() else shield(c, weight))

    return under, own


def stages(node: Node | None) -> list[Stage]:
    """All stages of a compiled node."""
    if isinstance(node, Stage):
        return [node]
    return [stage for part in getattr(node, "inside", ()) for stage in stages(part)]


def without_functions(node: Node) -> Node:
    """The node with the same y - c at every x, without the functions in it: all they add is in c as well.

    A function may read what is there in a forward only; the linear map that a node makes of W is there at any time.
    """
    if isinstance(node, Stage):
        return Stage(
            [
                e if isinstance(e.atoms.function, Replace) else replace(e, atoms=replace(e.atoms, function=None))
                for e in node.entries
            ]
        )
    if isinstance(node, Chain):
        return Chain([without_functions(part) for part in node.parts])
    if isinstance(node, Mix):
        return Mix([(c, without_functions(inner)) for c, inner in node.terms])
    return node


def weighs_rows(node: Node) -> bool:
    """Whether some weight in ``node`` is a tensor: one per row or per token."""
    if isinstance(node, Stage):
        return any(isinstance(e.coefficient, Tensor) for e in node.entries)
    if isinstance(node, Chain):
        return any(weighs_rows(part) for part in node.parts)
    if isinstance(node, RowBranches):
        return True
    return isinstance(node, Mix) and any(isinstance(c, Tensor) or weighs_rows(n) for c, n in node.terms)


def once(below: Below) -> Below:
    """Remember the last evaluation: branches ask for the same x."""
    last: list[tuple[Tensor, State]] = []

    def call(x: Tensor) -> State:
        if not last or last[0][0] is not x:
            last[:] = [(x, below(x))]
        return last[0][1]

    return call
