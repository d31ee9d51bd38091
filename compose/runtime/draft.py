"""A composition in the making: residents with what merges add to them, and nothing of the model changed yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from compose.algebra import normalize
from compose.base.sites import FINAL
from compose.expr.tree import Call, Expr
from compose.kernels.coefficients import Coefficient
from compose.kind.adapter import Adapter
from compose.kind.heads import own_vocabulary
from compose.parameter_space.certificate import Certificate
from compose.parameter_space.execute import Merged, Workspace, carry_out, resolve, warn_of_loss
from compose.parameter_space.method import refuse_without_data
from compose.runtime.composition import Composition, Origin
from compose.runtime.inputs import Row, is_zero
from compose.slots.branches import weighs_rows
from compose.slots.gate import Routing
from compose.slots.limits import check_limits, covers
from compose.slots.lowering import Known, flatten, gated_program, site_program
from compose.slots.slot import Program, Slot
from compose.slots.stage import Stage

if TYPE_CHECKING:
    from compose.runtime.model_runtime import Runtime


@dataclass(frozen=True)
class ResidentMerge:
    """A merge whose result is resident under its text: what its members were, and what writing it so has lost."""

    call: Call
    origin: Origin
    certificate: Certificate
    inner: Mapping[str, Certificate]  # of the merges among its members


Merges = dict[str, ResidentMerge]  # by the text of the merge


class Draft:
    """What lowering and merging need of a model, over residents that may differ from those it has."""

    def __init__(self, runtime: Runtime, weights: Mapping[str, Coefficient], extra: Mapping[str, Adapter]) -> None:
        self._runtime = runtime
        self.model, self.sites = runtime.model, runtime.sites
        self.adapters = {**runtime.adapters, **extra}
        self.merges: Merges = dict(runtime.merges)
        self.weights = weights
        self._leaves: dict[str, dict[str, Stage]] = {}  # of adapters that have been found to be as they were

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``; NotFound otherwise."""
        return self.adapters[name] if name in self.adapters else self._runtime.adapter(name)

    def slot(self, path: str) -> Slot:
        """The model's slot."""
        return self._runtime.slot(path)

    def leaves(self, name: str) -> dict[str, Stage]:
        """What was lowered of an adapter alone, by path, if it has not changed since."""
        if name not in self._leaves:
            self._leaves[name] = self._runtime.leaves.of(name, self.adapters[name])
        return self._leaves[name]

    # -- merges ----------------------------------------------------------------------------------------------------

    def lower(self, rows: Sequence[Expr]) -> tuple[Expr, ...]:
        """The rows without merges, which are carried out."""
        for row in rows:
            refuse_without_data(row)
        lowered = tuple(normalize(resolve(self, normalize(row), self.weights, self._keep)) for row in rows)
        for row in lowered:
            for name in row.refs:
                self.adapter(name)
            for node in row.walk():
                if isinstance(node, Call):
                    check_limits(self.sites, node, self.adapters)
        self.repeat_merges(lowered)
        return lowered

    def repeat_merges(self, rows: Sequence[Expr]) -> None:
        """Carry out once more the merges in these lowered rows whose members have changed."""
        for name in dict.fromkeys(name for row in rows for name in row.refs if name in self.merges):
            call = self.merges[name].call
            if all(member in self.adapters for member in call.refs):
                self._keep(call, partial(carry_out, Workspace(self), call, name, None))

    def _keep(self, call: Call, make: Callable[[], Merged]) -> None:
        """Make a merged adapter resident under the call's text, unless it is there and its members are as they were."""
        name = str(call)
        if name not in self.adapters or name not in self.merges or self.merges[name].origin.changed(self.adapters):
            origin = Origin({}, {n: self.adapters[n] for n in call.refs})
            made = make()
            self.adapters[name] = made.adapter
            self.merges[name] = ResidentMerge(call, origin, made.certificate, made.inner)
            warn_of_loss(call, made)

    # -- the composition -------------------------------------------------------------------------------------------

    def compose(self, rows: tuple[Expr, ...], routing: Routing | None) -> Composition:
        """Everything these lowered rows need, laid out."""
        tensors = [w for w in self.weights.values() if isinstance(w, Tensor)]
        count = max([len(rows), *(w.shape[0] for w in tensors)])
        pairs = [self._row(rows, i) for i in range(count)]
        # A weight of zero costs nothing: where no row has another, the adapter is not there.
        active = {n: self.adapters[n] for row in pairs for c, n in row if not is_zero(c)}
        inputs = self._runtime.inputs
        # What acts on the inputs rather than at a site: prefixes may stand in some layers only, so rows are by path.
        prefixes = inputs.prefixes(active, lambda path: [self._row(rows, i, path) for i in range(count)])
        named = {name: self.adapters[name] for row in rows for name in row.refs}
        trains = any(a.trainable for a in named.values())
        return Composition(
            rows,
            self.weights,
            routing,
            programs=self._programs(active, rows, routing),
            prefixes=prefixes.states,
            shift=prefixes.shift,
            prompt=inputs.prompts(active, pairs),
            count=count,
            # Weights per token fit texts of one length only; slots compare it with what comes.
            tokens=max((w.shape[1] for w in tensors if w.dim() == 2 and w.shape[1] > 1), default=0),
            vocabulary=self._own_vocabulary(named),
            measures_past=prefixes.measures_past,
            trains=trains,
            only_sides_learn=trains and self._only_sides_learn(named.values()),
            origin=Origin({}, {}) if trains else self._origin(named, active, tensors),
            device=self.model.device,
        )

    def _own_vocabulary(self, named: Mapping[str, Adapter]) -> tuple[str, int] | None:
        if not self.sites.output:  # its outputs are no tokens
            return None
        sizes = ((n, own_vocabulary(a, self.sites, self.model)) for n, a in named.items() if a.saved)
        return next(((name, size) for name, size in sizes if size is not None), None)

    def _programs(
        self, active: Mapping[str, Adapter], rows: tuple[Expr, ...], routing: Routing | None
    ) -> dict[str, Program]:
        programs: dict[str, Program] = {}
        known = Known(self.leaves)
        for path in dict.fromkeys(p for a in active.values() for p in (*a.module_paths, *a.saved) if _is_site(p, a)):
            if routing is not None:
                node = gated_program(self, path, routing.experts, routing.gate)
            else:
                node = site_program(self, path, rows, known)
            if node is not None:
                per_row = routing is not None or weighs_rows(node)
                programs[path] = self.slot(path).lay_out(node, per_row=per_row)
        for path in [tap for program in programs.values() for tap in program.taps]:
            programs.setdefault(path, Program()).tapped = True
        return programs

    def _row(self, rows: Sequence[Expr], i: int, path: str | None = None) -> Row:
        """Adapters of row i (at ``path``, or anywhere) with that row's weights (a number, or (T,) per token)."""
        expr = rows[i if len(rows) > 1 else 0]
        pairs = flatten(expr, self.weights, lambda call: path is None or covers(self.sites, call, path))
        return [(c[i] if isinstance(c, Tensor) else c, n) for c, n in pairs]

    def _origin(self, named: dict[str, Adapter], active: Mapping[str, Adapter], weights: list[Tensor]) -> Origin:
        members = {n: a for name in named if name in self.merges for n, a in self.merges[name].origin.members.items()}
        read = [p for a in active.values() if a.reads_below for p in a.module_paths]
        base = [p for path in read for p in self.slot(path).layer.parameters(recurse=False)]
        return Origin(named, members, [*base, *weights])

    def _only_sides_learn(self, adapters: Iterable[Adapter]) -> bool:
        """Whether no gradient is asked for inside the backbone: side networks and heads stand outside it."""
        learning = [a for a in adapters if a.trainable]
        side = self._runtime.side
        return all(
            set(a.paths) <= {FINAL} and not any(side.holds(self.model.get_submodule(p)) for p in a.saved)
            for a in learning
        )


def _is_site(path: str, adapter: Adapter) -> bool:
    return path in adapter.saved or not (adapter.prefix(path) or adapter.prompt())
