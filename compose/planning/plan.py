"""From an expression to a plan: what is loaded, merged and combined, in which order, and what may be freed when.

Everything that can be refused is refused here, from manifests alone, before a tensor is read: unknown functions,
adapters of different bases, merges of different kinds, ensembles inside a sum, heads that contradict each other,
compositions that contain themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import networkx as nx

from compose.algebra import digest, normalize
from compose.base.compatibility import differing, rung
from compose.errors import PlanError
from compose.expr.tree import Call, Expr, Ref, Scale, Seq
from compose.function import Family, bind, get_function
from compose.planning.unfold import Resolved, unfold
from hub.errors import BaseMismatch
from hub.manifest import BaseIdentity

if TYPE_CHECKING:
    from compose.kind.adapter import Adapter

Operation: TypeAlias = Literal["load", "scale", "add", "seq", "inject"] | Family


@dataclass(frozen=True)
class Leaf:
    """An adapter that has no manifest: one in memory."""

    kind: str
    base: BaseIdentity | None = None
    placement: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    type: str = "adapter"
    expression: str | None = None

    @classmethod
    def of(cls, adapter: Adapter) -> Leaf:
        """What a plan needs to know of an adapter in memory; its base is compared when it becomes resident."""
        return cls(
            adapter.kind, placement=adapter.paths, labels=adapter.labels, hyperparameters=adapter.config.model_dump()
        )


@dataclass(frozen=True)
class Step:
    """One node: its operation, the steps it reads, and the steps whose result nobody reads after it."""

    index: int
    operation: Operation
    expr: Expr
    inputs: tuple[int, ...]
    frees: tuple[int, ...]
    kind: str | None

    def __str__(self) -> str:
        what = f"{self.operation} {self.expr}" if self.operation != "inject" else "inject"
        reads = f" <- {', '.join(map(str, self.inputs))}" if self.inputs else ""
        freed = f"  (frees {', '.join(map(str, self.frees))})" if self.frees else ""
        return f"{self.index}: {what}" + (f" [{self.kind}]" if self.kind else "") + reads + freed


@dataclass(frozen=True)
class Plan:
    """A checked composition.

    ``expression`` has compositions expanded in place and is in normal form; ``graph`` is the frozen DAG over the
    indices of ``steps``; ``leaves`` maps the text of each ref that is loaded to what it resolved to.
    """

    expression: Expr
    graph: nx.DiGraph[int]
    steps: tuple[Step, ...]
    leaves: Mapping[str, Resolved]

    @property
    def digest(self) -> str:
        """Identity of the composition."""
        return digest(self.expression)

    @property
    def base(self) -> BaseIdentity | None:
        """The base its adapters were made for, or None if no adapter says."""
        return next((leaf.base for leaf in self.leaves.values() if leaf.base is not None), None)

    @cached_property
    def sites(self) -> Mapping[str, tuple[str, ...]]:
        """Module path -> the refs that act there."""
        acting: dict[str, list[str]] = {}
        for text, leaf in self.leaves.items():
            for path in leaf.placement:
                acting.setdefault(path, []).append(text)
        return {path: tuple(texts) for path, texts in sorted(acting.items())}

    @cached_property
    def peak(self) -> int:
        """The most results that are held at once when the steps run in order."""
        alive = most = 0
        for step in self.steps:
            alive += 1
            most = max(most, alive)
            alive -= len(step.frees)
        return most

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))


def plan(
    expr: Expr,
    resolve: Callable[[str], Resolved],
    *,
    check_base: Callable[[str, BaseIdentity], object] | None = None,
    allow_base_drift: bool = False,
) -> Plan:
    """Plan a composition.

    Parameters
    ----------
    expr
        The tree; compositions named in it are expanded in place.
    resolve
        From the text of a ref to its manifest (or a :class:`Leaf`); raises for unknown refs.
    check_base
        Called with each ref's text and base, e.g. to compare it with the loaded model; raises to refuse.
    allow_base_drift
        Let adapters of other weights of one architecture stand together.

    Raises
    ------
    PlanError, ExpressionError, BaseMismatch, NotFound
        Named by the text of the node at fault; nothing was loaded.
    """
    unfolded, leaves = unfold(expr, resolve)
    for text, leaf in leaves.items():
        if leaf.type == "router":
            raise PlanError(f"{text} is a router, not an adapter", ref=text, hint=f"hub route {text}")
    _check_bases(leaves, allow_base_drift)
    if check_base is not None:
        for text, leaf in leaves.items():
            if leaf.base is not None:
                check_base(text, leaf.base)
    _Checks(leaves).node(unfolded, outermost=True)
    normal = normalize(unfolded)
    used = {text: leaves[text] for text in normal.refs}
    graph, steps = _schedule(normal, used)
    return Plan(normal, graph, steps, used)


# -- checks --------------------------------------------------------------------------------------------------------


def _check_bases(leaves: Mapping[str, Resolved], allow_drift: bool) -> None:
    known = [(text, leaf.base) for text, leaf in leaves.items() if leaf.base is not None]
    for text, base in known[1:]:
        first, reference = known[0]
        nearness = rung(base, reference)
        if nearness == "incompatible" or (nearness == "drift" and not allow_drift):
            names = differing(base, reference)
            raise BaseMismatch(
                f"{first} was made for {reference.repo} and {text} for {base.repo}, another base: "
                f"{len(names)} tensors differ, {names[0]} first",
                ref=text,
                hint="adapters of one expression share one base; train one of them again on the other's base",
            )


class _Checks:
    """Walks the tree as it was written, so that errors show the user's own nodes."""

    def __init__(self, leaves: Mapping[str, Resolved]) -> None:
        self.leaves = leaves

    def node(self, expr: Expr, *, outermost: bool = False) -> None:
        if isinstance(expr, Call):
            self._call(expr, outermost)
        for child in expr.children:
            self.node(child)
        self._heads(expr)

    def _call(self, call: Call, outermost: bool) -> None:
        bind(call)
        family = get_function(call.function).family
        if family == "ensemble" and not outermost:
            raise PlanError(
                f"{call} mixes output probabilities, so it must be outermost, not a part of a larger expression",
                hint="put the sums and sequences inside its arguments",
            )
        if family == "merge":
            kinds = {arg: self.merge_kind(arg, call) for arg in call.args}
            first = call.args[0]
            mixed = len(set(kinds.values())) > 1 and not all(_changes_weights(kind) for kind in kinds.values())
            for arg, kind in kinds.items():
                if mixed and kind != kinds[first]:
                    raise PlanError(
                        f"{call} merges parameters of one kind, but {first} is {kinds[first]} and {arg} is {kind}",
                        hint=f"{first} + {arg} applies both; ensemble.mean({first}, {arg}) mixes their outputs",
                    )

    def merge_kind(self, expr: Expr, call: Call) -> str:
        """Kind of an argument of a merge: it has parameters only if it is an adapter or a merge itself."""
        if isinstance(expr, Ref):
            return self.leaves[expr.text].kind
        if isinstance(expr, Call) and get_function(expr.function).family == "merge":
            return self.merge_kind(expr.args[0], expr)
        raise PlanError(
            f"{call} merges the parameters of adapters, and {expr} is none",
            hint="merge first, then scale, add or sequence: 0.5 * average(a, b) + c",
        )

    def _heads(self, expr: Expr) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Modules that ``expr`` replaces whole: name -> (ref, labels). Side by side they must agree."""
        if isinstance(expr, Ref):
            leaf = self.leaves[expr.text]
            # What training published keeps the adapter's config apart from the run's.
            config = leaf.hyperparameters.get("adapter", leaf.hyperparameters)
            names = config.get("modules_to_save") or () if isinstance(config, Mapping) else ()
            return {str(name): (expr.text, tuple(leaf.labels)) for name in names}
        heads: dict[str, tuple[str, tuple[str, ...]]] = {}
        for child in expr.children:
            for name, (text, labels) in self._heads(child).items():
                other, theirs = heads.get(name, (text, labels))
                if not isinstance(expr, Seq) and labels and theirs and labels != theirs:  # in >> the last head stays
                    raise PlanError(
                        f"{other} and {text} both bring their own {name!r}, for different labels "
                        f"({_few(theirs)} and {_few(labels)}), so {expr} has no head",
                        ref=text,
                        hint=f"{other} >> {text} keeps the last head; a list of expressions gives each row its own",
                    )
                heads[name] = (text, labels)
        return heads


def _changes_weights(kind: str) -> bool:
    """Whether adapters of a kind are changes of weights, which merge whatever their kinds: lora, dora, dense, ..."""
    from compose.kind.registry import get_kind  # imports torch, which only a merge of different kinds costs

    return get_kind(kind).averages_in_weight


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# -- the graph -----------------------------------------------------------------------------------------------------


def _schedule(expr: Expr, leaves: Mapping[str, Resolved]) -> tuple[nx.DiGraph[int], tuple[Step, ...]]:
    """DAG of the distinct nodes (equal sub-expressions are one) and its steps in an order that can run."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    index: dict[Expr, int] = {}

    def visit(node: Expr) -> int:
        if node not in index:
            inputs = tuple(visit(child) for child in node.children)
            index[node] = len(index)
            graph.add_node(index[node], operation=_operation(node), expr=node, kind=_kind(node, leaves))
            graph.add_edges_from((i, index[node]) for i in inputs)
        return index[node]

    root = visit(expr)
    # What comes out of the root is put into the model: one more node, which reads the root and nothing else.
    graph.add_node(len(index), operation="inject", expr=expr, kind=None)
    graph.add_edge(root, len(index))
    # Any order in which inputs come first can run; of those the one by index, so that equal trees give equal plans.
    order = list(nx.lexicographical_topological_sort(graph))
    place = {node: at for at, node in enumerate(order)}
    # A result may be freed after the last step that reads it.
    last_read = {node: max(graph.successors(node), key=place.__getitem__) for node in order if graph.out_degree(node)}
    steps = []
    for node in order:
        data = graph.nodes[node]
        inputs = (
            tuple(dict.fromkeys(index[child] for child in data["expr"].children)) if node != len(index) else (root,)
        )
        frees = tuple(i for i in inputs if last_read[i] == node)
        steps.append(Step(node, data["operation"], data["expr"], inputs, frees, data["kind"]))
    return nx.freeze(graph), tuple(steps)


def _operation(expr: Expr) -> Operation:
    if isinstance(expr, Ref):
        return "load"
    if isinstance(expr, Call):
        return get_function(expr.function).family
    return "scale" if isinstance(expr, Scale) else "seq" if isinstance(expr, Seq) else "add"


def _kind(expr: Expr, leaves: Mapping[str, Resolved]) -> str | None:
    """Kind of the adapter a node stands for; None where it is a mixture of kinds."""
    kinds = {leaves[text].kind for text in expr.refs}
    return kinds.pop() if len(kinds) == 1 else None
