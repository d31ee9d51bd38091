"""Carrying merges out: each call of an expression becomes a job, and the job one new adapter.

Inside an expression a merge is carried out when it is activated (:func:`resolve`). The methods are files under
``compose/merges/``; on changes of weights ``deltas`` carries them out, on plain tensors ``tensors``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError, MergeWarning
from compose.expr.tree import Call, Expr, Ref, Scale, Seq, add, seq
from compose.function import bind, get_function
from compose.kernels.coefficients import Coefficient
from compose.kind.adapter import Adapter
from compose.kind.parameter_shift import Shift
from compose.parameter_space import deltas, tensors
from compose.parameter_space.certificate import Certificate
from compose.parameter_space.effect import entries
from compose.parameter_space.job import AdaptedModel, Job, Member, Statistics
from compose.parameter_space.method import Elementwise, Factored, Linear, Method, get_method, refuse_without_data
from compose.parameter_space.statistic import Statistic
from compose.slots.limits import limits
from compose.slots.lowering import site_program, unsupported
from compose.slots.slot import Slot
from hub.console.progress import Steps

_LOG = logging.getLogger("compose.merges")


@dataclass(frozen=True)
class Merged:
    """A merged adapter, frozen and not attached, and the certificate of what writing it so has lost."""

    adapter: Adapter
    certificate: Certificate = field(default_factory=Certificate)
    inner: Mapping[str, Certificate] = field(default_factory=dict)  # of the merges among its members, by their text


Measure: TypeAlias = Callable[[Job, type[Statistic]], Statistics]  # what is measured of a job's members on data


class Workspace:
    """A home with more adapters in it: what inner merges make on the way. ``measure`` has the data that some need."""

    def __init__(self, home: AdaptedModel, measure: Measure | None = None) -> None:
        self.measure = measure
        self.model: PreTrainedModel = home.model
        self.sites: SiteMap = home.sites
        self.adapters: dict[str, Adapter] = dict(home.adapters)
        self.weights: Mapping[str, Coefficient] = {}
        self.certificates: dict[str, Certificate] = {}  # of what was merged on the way, by its text
        self._home = home

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``, made here or resident at home; NotFound otherwise."""
        return self.adapters[name] if name in self.adapters else self._home.adapter(name)

    def slot(self, path: str) -> Slot:
        """The home's slot."""
        return self._home.slot(path)


def resolve(
    home: AdaptedModel,
    expr: Expr,
    weights: Mapping[str, Coefficient],
    keep: Callable[[Call, Callable[[], Merged]], None],
) -> Expr:
    """The expression without merges: each is a weighted sum where that is exactly the same, else a new adapter.

    Parameters
    ----------
    weights
        Weights by name, to refuse one that a merge would swallow.
    keep
        Called with each merge that needs a new adapter and a function that makes it: has to make it known by its text.
    """
    if isinstance(expr, Call):
        if limits(expr):
            return Call(expr.function, [resolve(home, expr.args[0], weights, keep)], expr.options)
        if get_function(expr.function).family != "merge":
            raise unsupported(expr)
        as_sum = _as_sum(home, expr)
        if as_sum is not None:
            return resolve(home, as_sum, weights, keep)
        for name in expr.refs:
            if name in weights:
                raise KindError(
                    f"a weight is given for {name!r}, which stands inside {expr}: that merge is made once",
                    hint="use the weights option of the merge",
                )
        keep(expr, lambda: carry_out(Workspace(home), expr, str(expr), None))
        return Ref(str(expr))
    if isinstance(expr, Scale):
        return Scale(expr.factor, resolve(home, expr.of, weights, keep))
    if isinstance(expr, Ref):
        return expr
    parts = [resolve(home, child, weights, keep) for child in expr.children]
    return seq(*parts) if isinstance(expr, Seq) else add(*parts)


def _as_sum(home: AdaptedModel, call: Call) -> Expr | None:
    """The weighted sum that a merge is, if it is one for these kinds: no adapter has to be made then."""
    method, options = get_method(call.function), bind(call)
    if not isinstance(method, Linear) or method.from_gram or getattr(options, "rank", None) is not None:
        return None
    in_weight = all(home.adapter(name).averages_in_weight for name in call.refs)
    if not in_weight and method.join is None:
        return None
    c = method.coefficients(options, len(call.args))
    return add(*(Scale(w, arg) for w, arg in zip(c, call.args, strict=True)))


def without_merges(workspace: Workspace, expr: Expr) -> Expr:
    """The expression without merges: those that are no sums are carried out and their results kept in the workspace."""
    if workspace.measure is None:
        refuse_without_data(expr)

    def keep(call: Call, make: Callable[[], Merged]) -> None:
        made = make()
        workspace.adapters[str(call)] = made.adapter
        workspace.certificates |= {**made.inner, str(call): made.certificate}

    return resolve(workspace, expr, {}, keep)


def carry_out(workspace: Workspace, call: Call, name: str, progress: Steps | None) -> Merged:
    """The adapter that a call makes, the merges inside it first; KindError names the call if it is no merge."""
    if workspace.measure is None:
        refuse_without_data(call)
    if get_function(call.function).family != "merge":
        raise unsupported(call)
    inner = Call(call.function, [without_merges(workspace, arg) for arg in call.args], call.options)
    made = execute(workspace, inner, name, str(call), progress)
    return replace(made, inner=dict(workspace.certificates))


def warn_of_loss(call: Call, made: Merged) -> None:
    """Say what a merge has lost: as a warning where nobody asked for a rank, else in the log alone."""
    ranks = {str(node): getattr(bind(node), "rank", None) for node in call.walk() if isinstance(node, Call)}
    for text, certificate in {**made.inner, str(call): made.certificate}.items():
        if certificate.exact:
            continue
        _LOG.info("%s: %s", text, certificate)
        if ranks.get(text) is None:
            room = f"{deltas.DENSE_BUDGET / 2**30:.3g} GiB"
            told = f"{text} is too large to be held whole ({room}), so it is cut: {certificate}"
            warnings.warn(f"{told}; rank=R chooses the rank", MergeWarning, stacklevel=2)


def execute(workspace: Workspace, call: Call, name: str, text: str, progress: Steps | None) -> Merged:
    """The adapter that a call without merges in its arguments makes; ``text`` names it in messages."""
    job = make_job(workspace, call, name, text, progress)
    if not job.adapters:
        raise job.refuse("there is no adapter in it")
    labels = labels_of(job)
    shifts = all(isinstance(a, Shift) for a in job.adapters) and job.rank is None
    if shifts and job.method.needs is None and not isinstance(job.method, Factored):
        workspace.adapters.update(
            {a.name: cast("Shift", a).as_dense(workspace.sites, workspace.model) for a in job.adapters}
        )
        merged = Merged(tensors.merge(make_job(workspace, call, name, text, progress)))
    else:
        merged = Merged(*deltas.merge(job)) if _in_weights(workspace, job) else Merged(tensors.merge(job))
    merged.adapter.labels = labels
    return merged


def labels_of(job: Job) -> tuple[str, ...]:
    """Names of the classes of the merged head: the members' own, which must be the same ones."""
    known = {a.labels: a.name for a in job.adapters if a.saved and a.labels}
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise job.refuse(f"the heads of {one!r} and {other!r} are for different labels, so they cannot be merged")
    return next(iter(known), ())


def dense_merge(workspace: Workspace, expr: Expr) -> Job | None:
    """The job of a merge whose result is no low-rank change of weights (TIES, DARE, ...); None for anything else.

    Nor is it one where a rank is asked for: then the merge is what that rank holds.
    """
    if not isinstance(expr, Call) or get_function(expr.function).family != "merge":
        return None
    inner = Call(expr.function, [without_merges(workspace, arg) for arg in expr.args], expr.options)
    job = make_job(workspace, inner, str(expr), str(expr), None)
    if job.rank is not None or all(isinstance(a, Shift) for a in job.adapters):  # the latter's result is dense itself
        return None
    return job if isinstance(job.method, Elementwise) and _in_weights(workspace, job) else None


def _in_weights(workspace: Workspace, job: Job) -> bool:
    return all(a.averages_in_weight for a in job.adapters) and any(_moves_weights(workspace, a) for a in job.adapters)


def make_job(workspace: Workspace, call: Call, name: str, text: str, progress: Steps | None) -> Job:
    """The job of a call without merges in its arguments."""
    members = tuple(Member.of(arg, workspace) for arg in call.args)
    method: Method = get_method(call.function)
    if workspace.measure is None:
        refuse_without_data(call)
    job = Job(workspace, members, method, bind(call), name, text, progress)
    if method.needs is None or workspace.measure is None:
        return job
    return replace(job, statistics=workspace.measure(job, method.needs))


def _moves_weights(workspace: Workspace, adapter: Adapter) -> bool:
    """Whether the adapter adds a matrix to a weight, rather than scaling it or moving its bias."""
    for path in adapter.module_paths:
        node = site_program(workspace, path, (Ref(adapter.name),))
        if node is not None:
            return any(e.atoms.A is not None or e.atoms.delta is not None for e in entries(node))
    return False
