"""What a composition is and costs, found before anything is loaded: ``hub compose check`` and ``explain``.

The plan is made from manifests, the adapters are put on a fake base (:mod:`compose.inspection.fake_base`), and the
composition is activated and run there: what cannot work is refused with its place in the text, and costs are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.algebra import parse
from compose.algebra.carets import point
from compose.base.at_hand import at_hand
from compose.base.compatibility import BaseWarning, Rung, compare
from compose.expr.tree import Call, Expr, Ref
from compose.function import bind
from compose.planning.held import held_as, manifests_of
from compose.planning.members import AdapterFinder, StoredAdapter, task_of
from compose.planning.plan import Plan, Step, plan
from compose.planning.requirements import requirements
from hub.errors import HubError, UsageError
from hub.manifest import BaseIdentity, Requirement

if TYPE_CHECKING:
    from compose.inspection.fake_base import FakeBase
    from compose.parameter_space.certificate import Certificate

__all__ = ["BaseFacts", "Checked", "Explanation", "Member", "base_of", "check", "explain"]


@dataclass(frozen=True)
class BaseFacts:
    """The base: its identity, how it is held, and what one forward costs.

    Bytes; flops are per token (or image), None where the model's forward cannot be counted without its weights.
    """

    name: str
    weights_fingerprint: str
    quantize: str
    parameters: int
    bytes: int
    flops: float | None


@dataclass(frozen=True)
class Member:
    """One adapter: where it is from, its size in bytes, its rung on the base ladder, what it adds to a token."""

    text: str
    ref: str
    digest: str | None
    type: str
    kind: str
    sites: int
    parameters: int
    bytes: int
    rung: Rung | None
    flops: float | None


@dataclass(frozen=True)
class Explanation:
    """A composition that was checked. ``where`` tells for each step of the plan where and when it runs."""

    text: str
    plan: Plan
    base: BaseFacts
    members: tuple[Member, ...]
    requires: tuple[Requirement, ...]
    where: tuple[str, ...]
    shared: Mapping[tuple[str, str], int]  # two members -> at how many sites both act
    flops: float | None
    merged_bytes: int = 0  # of the adapters that merges make
    certificates: Mapping[str, Certificate | None] = field(default_factory=dict)  # of merges; None: loading tells
    warnings: tuple[str, ...] = ()

    @property
    def adapter_bytes(self) -> int:
        """Memory of all members, and of what is merged from them."""
        return sum(member.bytes for member in self.members) + self.merged_bytes

    @property
    def relative_cost(self) -> float | None:
        """Added operations over those of the base."""
        return None if self.flops is None or not self.base.flops else self.flops / self.base.flops

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        steps = [
            {
                "index": step.index,
                "operation": step.operation,
                "expression": None if step.operation == "inject" else str(step.expr),
                "inputs": list(step.inputs),
                "frees": list(step.frees),
                "kind": step.kind,
                "where": where,
            }
            for step, where in zip(self.plan.steps, self.where, strict=True)
        ]
        return {
            "expression": self.text,
            "normal": str(self.plan.expression),
            "digest": self.plan.digest,
            "base": vars(self.base),
            "members": [vars(member) for member in self.members],
            "requires": [need.as_dict() for need in self.requires],
            "steps": steps,
            "certificates": {text: one and one.as_dict() for text, one in self.certificates.items()},
            "peak": self.plan.peak,
            "conflicts": [{"members": list(pair), "sites": count} for pair, count in self.shared.items()],
            "memory": {
                "base": self.base.bytes,
                "adapters": self.adapter_bytes - self.merged_bytes,
                "merged": self.merged_bytes,
                "total": self.base.bytes + self.adapter_bytes,
            },
            "added_flops": self.flops,
            "relative_cost": self.relative_cost,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Checked:
    """A composition that works on a base: its plan, the base's identity and outline, each member's rung."""

    text: str
    expr: Expr
    plan: Plan
    base: str | Path
    known: BaseIdentity
    outline: FakeBase
    rungs: Mapping[str, Rung]
    warnings: tuple[str, ...]


def check(
    text: str,
    finder: AdapterFinder,
    *,
    base: str | Path | None = None,
    quantize: str | None = None,
    allow_base_drift: bool = False,
    **options: Any,
) -> Checked:
    """Check a composition for a base: manifests, base ladder, every shape, what each site can carry.

    Parameters
    ----------
    text
        The expression.
    finder
        Where its leaves are.
    base
        As for :func:`compose.load`; default: the one its adapters were made for.
    quantize
        How the base is held; default: as its adapters were trained, as in `hub run`.
    options
        ``task``, ``labels``, ``double_quant``, ``dtype`` as for :func:`compose.load`.

    Raises
    ------
    HubError
        Whatever is wrong with it; the message ends with the text and the place. No tensor was read.
    """
    expr = parse(text)
    trial = _Trial(finder, allow_base_drift)
    planned = _pointed(text, trial, expr)
    base = base or base_of(planned, finder)

    from compose.base.model import identity_of  # torch comes with these, and most of what is refused is refused above
    from compose.inspection.fake_base import FakeBase

    trial.known = identity_of(base)
    task, labels = _task(planned, options)
    held = held_as(quantize, manifests_of(expr.refs, finder))
    trial.outline = FakeBase(base, quantize=held, **{**options, "task": task, "labels": labels})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BaseWarning)
        planned = _pointed(text, trial, expr)
    said = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, BaseWarning))
    if not trial.tried:
        unsure = f"{planned.expression} looks at values when it is activated, so only loading tells whether it works"
        said[unsure] = None
    return Checked(text, expr, planned, base, trial.known, trial.outline, trial.rungs, tuple(said))


def explain(text: str, finder: AdapterFinder, **options: Any) -> Explanation:
    """Check a composition and say what it is and costs; parameters and errors as for :func:`check`.

    Of merges that a rank limits the members' tensors are read, so that what is left out is a measure, not a guess.
    """
    from compose.inspection.certificates import certificates

    checked = check(text, finder, **options)
    outline, planned = checked.outline, checked.plan
    base = BaseFacts(
        outline.name,
        checked.known.weights_fingerprint,
        outline.request.quantize,
        outline.base_parameters,
        outline.bytes,
        _each(outline.base_flops, outline),
    )
    measured = certificates(planned.expression, outline, finder)
    published = [ref for ref in checked.expr.refs if finder.find(ref).digest is not None]
    return Explanation(
        text,
        planned,
        base,
        tuple(_member(leaf, finder.find(leaf), checked) for leaf in planned.leaves),
        requirements(published, finder),
        tuple(_where(step, planned, outline, finder) for step in planned.steps),
        _shared(planned, outline),
        _each(outline.added_flops(planned.expression), outline),
        sum(p.numel() * p.element_size() for merged in outline.merged.values() for p in merged.parameters()),
        measured,
        checked.warnings,
    )


def _pointed(text: str, trial: _Trial, expr: Expr) -> Plan:
    try:
        return trial(expr)
    except HubError as error:
        raise point(text, error, trial) from error


@dataclass
class _Trial:
    """Everything that can refuse an expression, in the order of its cost: manifests, base ladder, shapes."""

    finder: AdapterFinder
    allow_drift: bool
    known: BaseIdentity | None = None
    outline: FakeBase | None = None
    rungs: dict[str, Rung] = field(default_factory=dict)
    tried: bool = True

    def __call__(self, expr: Expr) -> Plan:
        planned = self.plan(expr)
        if self.outline is not None:
            for text in planned.leaves:
                if text not in self.outline.runtime.adapters:
                    self.outline.put(text, self.finder.find(text))
            self.tried = self.outline.activate(planned.expression)
        return planned

    def plan(self, expr: Expr) -> Plan:
        return plan(expr, self.finder.resolve, check_base=self._ladder, allow_base_drift=self.allow_drift)

    def _ladder(self, text: str, made_for: BaseIdentity) -> None:
        if self.known is None or self.outline is None:
            return
        manifest = self.finder.find(text).manifest
        self.rungs[text] = compare(
            made_for,
            self.known,
            trained_on=manifest.trained_on if manifest else None,
            quantization=self.outline.request.quantize,
            ref=text,
            allow_drift=self.allow_drift,
        )


def base_of(planned: Plan, finder: AdapterFinder) -> str:
    """The base that the adapters of a plan were made for, as it can be loaded.

    Raises
    ------
    UsageError
        No adapter says which.
    """
    if planned.base is not None:
        return at_hand(planned.base)
    named = (finder.find(text).config.get("base_model_name_or_path") for text in planned.leaves)
    base = next((str(name) for name in named if name), None)
    if base is None:
        raise UsageError("no adapter of this expression says which base it was made for", hint="give --base BASE")
    return base


def _task(planned: Plan, options: Mapping[str, Any]) -> tuple[str | None, Any]:
    if options.get("task") is not None:
        return str(options["task"]), options.get("labels")
    return task_of(planned.leaves.values(), options.get("labels"))


# -- facts ---------------------------------------------------------------------------------------------------------


def _each(flops: int | None, outline: FakeBase) -> float | None:
    """Per token, of a count for the outline's whole text."""
    return None if flops is None else flops / outline.length


def _member(text: str, stored: StoredAdapter, checked: Checked) -> Member:
    adapter = checked.outline.runtime.adapters[text]
    return Member(
        text,
        stored.ref,
        stored.digest,
        stored.facts.type,
        adapter.kind,
        len(adapter.paths),
        stored.parameters,
        stored.size,
        checked.rungs.get(text),
        _each(checked.outline.added_flops(Ref(text)), checked.outline),
    )


def _shared(planned: Plan, outline: FakeBase) -> dict[tuple[str, str], int]:
    paths = {text: {*(a := outline.runtime.adapters[text]).module_paths, *a.saved} for text in planned.leaves}
    pairs = {(a, b): len(paths[a] & paths[b]) for a, b in combinations(paths, 2)}
    return {pair: count for pair, count in pairs.items() if count}


def _where(step: Step, planned: Plan, outline: FakeBase, finder: AdapterFinder) -> str:
    if step.operation == "load":
        stored = finder.find(step.expr.refs[0])
        return "from the store" if stored.digest else f"from {stored.ref}"
    if step.operation == "inject":
        return _slots(planned.expression, outline)
    if step.operation == "ensemble":
        return f"router: {len(step.inputs)} rows a text, one forward, their probabilities mixed"
    if step.operation == "route":
        return "router: weights per row or token, applied in the forward"
    if step.operation == "merge" and isinstance(step.expr, Call):
        return _merge(step.expr, outline)
    return "in the forward"


def _merge(call: Call, outline: FakeBase) -> str:
    if not outline.makes_adapter(call):
        return "in the forward, as a weighted sum"
    rank = getattr(bind(call), "rank", None)
    return "at load, in parameter space: a new adapter" + (f" of rank {rank}" if rank else "")


def _slots(expr: Expr, outline: FakeBase) -> str:
    adapters = [outline.runtime.adapters[name] for name in expr.refs]
    inputs = {"attention" for a in adapters if any(a.prefix(p) for p in a.paths)}
    inputs |= {"the embedding" for a in adapters if a.prompt()}
    linear = {p for a in adapters for p in (*a.module_paths, *a.saved) if not (a.prefix(p) or a.prompt())}
    places = ([f"{len(linear)} modules"] if linear else []) + sorted(inputs)
    return "slots at " + " and ".join(places) if places else "nothing: the bare base"
