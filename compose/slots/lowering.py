"""From an expression to what each slot computes: the compile step of activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from compose.atoms import Atoms, Function, Replace, Side
from compose.base.sites import Site, SiteMap
from compose.errors import KindError
from compose.expr.tree import Call, Expr, Ref, Scale, Seq
from compose.kernels.coefficients import Coefficient, multiply
from compose.kind.adapter import Adapter
from compose.slots.branches import Chain, Mix, RowBranches, weighs_rows
from compose.slots.gate import Gate, GatedExperts, Mixer
from compose.slots.limits import covers, limits
from compose.slots.side import SideSlot
from compose.slots.slot import BelowView, Slot
from compose.slots.stage import Entry, Node, Stage

Rows = Sequence[Expr]


class LoweringContext(Protocol):
    """What lowering needs to know of a model: its adapters, the weights given by name, its sites and its slots."""

    adapters: dict[str, Adapter]

    @property
    def weights(self) -> Mapping[str, Coefficient]:
        """Weights given by name."""

    sites: SiteMap

    def slot(self, path: str) -> Slot:
        """The slot at ``path``."""


@dataclass(frozen=True)
class Known:
    """What was lowered before and is still good, to be looked up and added to.

    Attributes
    ----------
    leaves
        Stages of an adapter alone by path, from its name.
    columns
        Weights of one adapter in each row, which are alike at most sites.
    """

    leaves: Callable[[str], dict[str, Stage]] = lambda _name: {}
    columns: dict[tuple[float, ...], Tensor] = field(default_factory=dict)


def flatten(
    expr: Expr, weights: Mapping[str, Coefficient], inside: Callable[[Call], bool] | None = None
) -> list[tuple[Coefficient, str]]:
    """Adapters of an expression in the order they are applied, each with the product of the factors around it.

    ``inside`` answers for the calls that say where their argument acts; without it they are refused.
    """
    if isinstance(expr, Ref):
        return [(weights.get(expr.text, 1.0), expr.text)]
    if isinstance(expr, Scale):
        return [(multiply(c, expr.factor), name) for c, name in flatten(expr.of, weights, inside)]
    if isinstance(expr, Call):
        if inside is None or not limits(expr):
            raise unsupported(expr)
        return flatten(expr.args[0], weights, inside) if inside(expr) else []
    return [pair for child in expr.children for pair in flatten(child, weights, inside)]


def unsupported(call: Call) -> KindError:
    """The error for a function that does not run inside a forward."""
    return KindError(
        f"{call.function}(...) cannot be activated in a model", hint="hub compose explain EXPR says what runs where"
    )


def site_program(context: LoweringContext, path: str, rows: Rows, known: Known | None = None) -> Node | None:
    """What the slot at ``path`` computes for these rows (one: for all), or None if nothing acts there."""
    known = known or Known()
    builder = _Site(context, path, known)
    lowered = {expr: builder.node(expr, _BARE) for expr in dict.fromkeys(rows)}
    nodes = [lowered[expr] for expr in rows]
    if len(rows) == 1:
        return nodes[0]
    if all(n is None for n in nodes):
        return None
    if all(n is None or isinstance(n, Stage) for n in nodes):
        return _stack_rows([n.entries if isinstance(n, Stage) else () for n in nodes], known.columns)
    device = builder.slot.device
    rows_of: dict[Expr, Tensor] = {}
    for i, expr in enumerate(rows):
        rows_of.setdefault(expr, torch.zeros(len(rows), dtype=torch.bool, device=device))[i] = True
    branches = {expr: node for expr, node in zip(rows, nodes, strict=True) if node is not None}
    return RowBranches([(rows_of[expr], node) for expr, node in branches.items()])


def gated_program(context: LoweringContext, path: str, experts: Rows, gate: Gate | Mixer) -> Node | None:
    """What the slot at ``path`` computes where a gate weighs the experts, or None if none of them acts there."""
    builder = _Site(context, path, Known())
    nodes = [builder.node(expr, _BARE) for expr in experts]
    return None if all(n is None for n in nodes) else GatedExperts(path, gate, nodes)


def _stack_rows(rows: Sequence[Sequence[Entry]], columns: dict[tuple[float, ...], Tensor]) -> Stage:
    """One stage for rows that differ only in their weights: each entry gets a weight per row."""
    entries: dict[str, Entry] = {}
    weights: dict[str, list[Coefficient]] = {}
    count = len(rows)
    for i, row in enumerate(rows):
        for e in row:
            column = weights.get(e.key)
            if column is None:
                entries[e.key] = e
                column = weights[e.key] = [0.0] * count
            column[i] = column[i] + _pick(e.coefficient, i, count)
    return Stage([Entry(e.name, k, e.atoms, _join(weights[k], columns), e.live) for k, e in entries.items()])


def _pick(c: Coefficient, row: int, rows: int) -> Coefficient:
    if not isinstance(c, Tensor):
        return c
    if c.shape[0] != rows:
        raise KindError(f"weights for {c.shape[0]} rows were given to a composition of {rows} rows")
    return c[row]


def _join(column: Sequence[Coefficient], known: dict[tuple[float, ...], Tensor]) -> Coefficient:
    tensors = [c for c in column if isinstance(c, Tensor)]
    if tensors:
        shape = max((c.shape for c in tensors), key=len)
        return torch.stack([torch.as_tensor(c, dtype=torch.float32).expand(shape) for c in column])
    numbers = tuple(cast("Sequence[float]", column))
    if len(set(numbers)) == 1:
        return numbers[0]
    if numbers not in known:
        known[numbers] = torch.tensor(numbers, dtype=torch.float32)
    return known[numbers]


@dataclass(frozen=True)
class _Under:
    """The stages that a node stands on, the expressions they came from, and the parts it is confined to (None: all)."""

    nodes: tuple[Node, ...] = ()
    texts: tuple[str, ...] = ()
    within: tuple[Site, ...] | None = None


_BARE = _Under()


class _Site:
    """Builds the nodes of one site."""

    def __init__(self, context: LoweringContext, path: str, known: Known) -> None:
        self.context, self.path, self.known = context, path, known
        self.slot = context.slot(path)
        self.parts = context.sites.parts.get(path, ())
        self._lowered: dict[str, Atoms | None] = {}

    def node(self, expr: Expr, under: _Under) -> Node | None:
        if isinstance(expr, Ref):
            return self._leaf(expr.text, under)
        if isinstance(expr, Scale):
            return self._scaled(expr.factor, self.node(expr.of, under))
        if isinstance(expr, Call):
            within = self._within(expr, under)
            return None if within == () else self.node(expr.args[0], replace(under, within=within))
        if isinstance(expr, Seq):
            return self._one_after_another(expr.stages, under)
        return self._side_by_side([self.node(term, under) for term in expr.children])

    @staticmethod
    def _scaled(factor: float, node: Node | None) -> Node | None:
        if node is None or factor == 0:
            return None
        if isinstance(node, Stage):
            return Stage([e.times(factor) for e in node.entries])
        return Mix([(factor, node)])

    def _within(self, call: Call, under: _Under) -> tuple[Site, ...] | None:
        """The parts of this site that a call lets its argument act on: none of them (), or None for the whole site."""
        if not limits(call):
            raise unsupported(call)
        carried = any(self.path in self.context.adapters[name].saved for name in call.refs)
        if carried or covers(self.context.sites, call, self.path):
            return under.within
        parts = self.parts if under.within is None else under.within
        return tuple(part for part in parts if covers(self.context.sites, call, part.path))

    def _leaf(self, name: str, under: _Under) -> Node | None:
        weight = self.context.weights.get(name, 1.0)
        if not isinstance(weight, Tensor) and weight == 0:
            return None
        adapter = self.context.adapters[name]
        # Rows that join and leave lay out the same adapters again and again.
        leaves = self.known.leaves(name) if under is _BARE and not isinstance(weight, Tensor) and weight == 1 else {}
        if self.path in leaves:
            return leaves[self.path]
        entries = []
        for part, path in self._places(under.within):
            key = " >> ".join((*under.texts, name)) if adapter.reads_below else name
            key = key if part is None else f"{key} at {path} in {part.rows}"
            if key not in self._lowered:
                self._check_below(adapter, under)
                self._lowered[key] = self._atoms(adapter, under, part, path)
            atoms = self._lowered[key]
            if atoms is not None:
                entries.append(Entry(name, key, atoms, weight, live=adapter.trainable))
        if not entries:
            return None
        stage = Stage(entries)
        if stage.simple:  # nothing but its own tensors is in it
            leaves[self.path] = stage
        return stage

    def _places(self, within: tuple[Site, ...] | None) -> Iterator[tuple[Site | None, str]]:
        """Where an adapter may act here, each with the part of the output it may move: the whole site, and its parts.

        Confined to some parts, what acts on the whole site moves each of them.
        """
        yield from ((part, self.path) for part in ((None,) if within is None else within))
        yield from ((part, part.path) for part in (self.parts if within is None else within))

    def _check_below(self, adapter: Adapter, under: _Under) -> None:
        if adapter.reads_below and any(weighs_rows(node) for node in under.nodes):
            raise KindError(
                f"{adapter.kind} adapter {adapter.name!r} takes its norm from the weight below it at {self.path}, "
                "which differs from row to row there",
                hint="put it first, or give the stages before it plain numbers as weights",
            )

    def _atoms(self, adapter: Adapter, under: _Under, part: Site | None, path: str) -> Atoms | None:
        head = adapter.head(path)
        if head is not None:
            return Atoms(
                function=Replace(_in_its_own_precision(head, self.slot.layer), _own_tokens(head, self.slot.layer))
            )
        own = part is not None and path == part.path
        atoms = adapter.lower(path, BelowView(self.slot, under.nodes, part.rows if part is not None and own else None))
        if atoms is not None and isinstance(atoms.function, Function) and atoms.function.tap:
            source = partial(self.context.slot(atoms.function.tap).input, self.path)
            atoms = replace(atoms, function=replace(atoms.function, source=source))
        if atoms is not None and isinstance(atoms.function, Side):
            atoms = replace(atoms, function=replace(atoms.function, trace=cast("SideSlot", self.slot).trace_of_call))
        return atoms if atoms is None or part is None else self._confined(adapter, atoms, part, own)

    def _confined(self, adapter: Adapter, atoms: Atoms, part: Site, own: bool) -> Atoms:
        if atoms.input_gain is not None:
            raise KindError(
                f"{adapter.kind} adapter {adapter.name!r} scales the input of {part.path}, which it has in common with "
                f"the other parts of {part.module}",
                hint=f"let it act on {part.module} as a whole, or scale outputs",
            )
        assert part.rows is not None  # noqa: S101 - it is a part
        return atoms.lifted(part.rows, part=own)

    def _side_by_side(self, nodes: Sequence[Node | None]) -> Node | None:
        entries: list[Entry] = []
        branches: list[tuple[Coefficient, Node]] = []
        for node in nodes:
            if isinstance(node, Stage):
                entries.extend(node.entries)
            elif isinstance(node, Mix):
                branches.extend(node.terms)
            elif node is not None:
                branches.append((1.0, node))
        if not branches:
            return Stage(_merge_equal(entries)) if entries else None
        return Mix([*([(1.0, Stage(_merge_equal(entries)))] if entries else []), *branches])

    def _one_after_another(self, stages: Sequence[Expr], under: _Under) -> Node | None:
        parts: list[Node] = []
        texts: list[str] = []
        for expr in stages:
            node = self.node(expr, _Under((*under.nodes, *parts), (*under.texts, *texts), under.within))
            if node is None:
                continue
            texts.append(f"({expr})")
            if parts and isinstance(node, Stage) and node.additive and isinstance(parts[-1], Stage):
                # Nothing of it reads what is below, so it may stand beside the stage before it.
                parts[-1] = Stage(_merge_equal([*parts[-1].entries, *node.entries]))
            else:
                parts.append(node)
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else Chain(parts)


def _in_its_own_precision(head: nn.Module, base: nn.Module) -> Callable[[Tensor], Tensor]:
    """A carried module is kept in float32 whatever the base computes in; what comes out is in the base's dtype."""
    inside = next((p.dtype for p in head.parameters()), None)
    outside = next((p.dtype for p in base.parameters() if p.is_floating_point()), None)

    def run(x: Tensor) -> Tensor:
        known = x.is_floating_point()  # else x holds token ids, and an embedding says what comes out
        y = cast("Tensor", head(x.to(inside) if known else x))
        return y.to(x.dtype if known else outside)

    return run


def _own_tokens(head: nn.Module, base: nn.Module) -> str | None:
    """Why a table of other tokens than the base's stands alone: what is below cannot look them up."""
    own, known = getattr(head, "num_embeddings", None), getattr(base, "num_embeddings", None)
    if own == known or None in (own, known):
        return None
    return f"has a vocabulary of its own, of {own} tokens, and what else is active reads the base's {known}"


def _merge_equal(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of one adapter added into one; those that cancel to zero go."""
    merged: dict[str, Entry] = {}
    for e in entries:
        if e.key in merged:
            e = replace(e, coefficient=_plus(merged[e.key].coefficient, e.coefficient))  # noqa: PLW2901
        merged[e.key] = e
    return [e for e in merged.values() if isinstance(e.coefficient, Tensor) or e.coefficient != 0]


def _plus(a: Coefficient, b: Coefficient) -> Coefficient:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() != b.dim():
        a, b = (a[:, None], b) if a.dim() < b.dim() else (a, b[:, None])
    return a + b
