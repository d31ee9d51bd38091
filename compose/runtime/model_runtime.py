"""Inject, activate, eject: the life of adapters inside a frozen model.

``model.moduloom`` holds the runtime: which adapters are resident, which composition is active. Slots replace base
layers where some adapter acts and stay until :func:`eject` puts every module, parameter and flag back as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.algebra import ExprLike, as_rows, normalize
from compose.base.quantization import keep_differentiable
from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.expr.tree import IDENTITY, Call, Expr, add
from compose.kernels.coefficients import Coefficient, check_coefficients
from compose.kind.adapter import Adapter
from compose.parameter_space.execute import Merged, resolve
from compose.parameter_space.method import refuse_without_data
from compose.planning.plan import Leaf, plan
from compose.runtime.hooks import CallHooks
from compose.runtime.inputs import Inputs, Row, is_zero, replace_module
from compose.runtime.recent_programs import RecentPrograms, stamps
from compose.slots.branches import weighs_rows
from compose.slots.gate import Gate, Mixer, Routing, refuse_outside
from compose.slots.limits import check_limits, covers
from compose.slots.lowering import flatten, gated_program, site_program
from compose.slots.side import SideSlot
from compose.slots.slot import Context, Slot
from hub.errors import NotFound, did_you_mean

_HOME = "moduloom"  # attribute of the model that holds the runtime


class Runtime:
    """Adapters and slots of one model, and the composition that is active."""

    def __init__(self, model: PreTrainedModel) -> None:
        keep_differentiable(model)
        self.model = model
        self.sites = SiteMap(model)
        self.context = Context()
        self.adapters: dict[str, Adapter] = {}
        self.rows: tuple[Expr, ...] = (IDENTITY,)
        self.weights: Mapping[str, Coefficient] = {}
        self.routing: Routing | None = None
        self._slots: dict[str, Slot] = {}
        self._side = SideSlot(model, self.sites, self._only_sides_learn)
        self._inputs = Inputs(model, self.sites, self.context)
        self._names: tuple[str, ...] = ()  # adapters of the active rows, as of the last lowering
        self._trains = False  # whether an active adapter trains, as of the last lowering
        self._lowered: Any = None  # what the slots were made of: see _revisions
        self._programs = RecentPrograms()
        self._stamps: dict[str, Any] = {}  # of merged adapters: what their members were
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        self._bank = nn.ModuleDict()  # as submodules, adapters follow .to(), .train() and DDP
        model.add_module("moduloom_adapters", self._bank)
        self._hooks = CallHooks(model, self.sites, self.context, self._before_call)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lowered": None}  # a copy of the model (copy.deepcopy) lowers at its first call

    # -- residents -------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter) -> Adapter:
        """Make an adapter resident under ``name``; an earlier one of that name is replaced.

        Raises
        ------
        KindError
            It acts in modules that this model does not have, or cannot take the place of one that is active.
        """
        absent = sorted({*adapter.module_paths, *adapter.saved} - {FINAL, *self.sites.modules})
        if absent:
            raise KindError(
                f"adapter {name!r} acts at {absent[0]}, which this {self.sites.model_type} model does not have",
                hint="it was made for another model",
            )
        before = self.adapters.get(name)
        self._keep(name, adapter)
        if any(name in row.refs for row in self.rows):
            try:
                self.refresh()
            except Exception:
                self._keep(name, cast("Adapter", before))
                self.refresh()
                raise
        return adapter

    def _keep(self, name: str, adapter: Adapter) -> None:
        self._programs.drop(name)
        adapter.name = name
        adapter.home = weakref.ref(self)
        adapter.to(self.model.device).train(self.model.training)
        self.adapters[name] = adapter
        self._bank[_key(name)] = adapter

    def remove(self, name: str) -> None:
        """Let a resident adapter go. It must not be active."""
        self.adapter(name)
        if any(name in row.refs for row in self.rows):
            raise KindError(f"adapter {name!r} is active", hint="activate something else first")
        del self.adapters[name], self._bank[_key(name)]
        self._programs.drop(name)

    def adapter(self, name: str) -> Adapter:
        """The resident adapter called ``name``; NotFound with a suggestion otherwise."""
        if name not in self.adapters:
            near = did_you_mean(name, self.adapters)
            raise NotFound(
                f"no adapter {name!r} is attached" + (f"; did you mean {' or '.join(near)}?" if near else ""),
                ref=name,
                hint="compose.attach(model, name, source) makes one resident",
            )
        return self.adapters[name]

    # -- activation ------------------------------------------------------------------------------------------------

    def activate(
        self, rows: Sequence[Expr], weights: Mapping[str, Coefficient], routing: Routing | None = None
    ) -> None:
        """Make these rows active (one: for all rows of any batch). On an error what was active stays active."""
        for name in weights:
            self.adapter(name)
        check_coefficients(len(rows), weights)
        self._set(self._lower(rows, weights), weights, routing)

    def route(self, experts: Sequence[Expr], gate: Gate | Mixer) -> None:
        """Make these experts active, weighed by a gate at each site. On an error what was active stays active."""
        lowered = self._lower(experts, {})
        for name in dict.fromkeys(name for expert in lowered for name in expert.refs):
            refuse_outside(self.adapters[name])
        self._set((add(*lowered),), {}, Routing(lowered, gate))

    def _lower(self, rows: Sequence[Expr], weights: Mapping[str, Coefficient]) -> tuple[Expr, ...]:
        for row in rows:
            refuse_without_data(row)
        lowered = tuple(normalize(resolve(self, normalize(row), weights, self._keep_merged)) for row in rows)
        for row in lowered:
            for name in row.refs:
                self.adapter(name)
            for node in row.walk():
                if isinstance(node, Call):
                    check_limits(self.sites, node, self.adapters)
        return lowered

    def _set(self, rows: tuple[Expr, ...], weights: Mapping[str, Coefficient], routing: Routing | None) -> None:
        before = self.rows, self.weights, self.routing
        self.rows, self.weights, self.routing = rows, weights, routing
        try:
            self.refresh()
        except Exception:
            self.rows, self.weights, self.routing = before
            self.refresh()
            raise

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Afterwards what is active, and who is resident, is as before: for trying one composition after another."""
        active, residents = (self.rows, self.weights, self.routing), set(self.adapters)
        try:
            yield
        finally:
            self._set(*active)
            for name in self.adapters.keys() - residents:
                self.remove(name)

    def refresh(self) -> None:
        """Lower the active composition anew: after activation, and each forward while an adapter trains."""
        self._names = tuple(dict.fromkeys(name for row in self.rows for name in row.refs))
        pairs = [self._row(i) for i in range(self._row_count())]
        # A weight of zero costs nothing: where no row has another, the adapter is not there.
        active = {n: self.adapters[n] for row in pairs for c, n in row if not is_zero(c)}
        # Weights per token fit texts of one length only; slots compare it with what comes.
        self.context.tokens = max((w.shape[1] for w in self._tensors() if w.dim() == 2 and w.shape[1] > 1), default=0)
        # All slots first: an adapter that is not active any more must not act on, and taps are set by other slots.
        self._side.clear()
        for slot in self._slots.values():
            slot.clear()
        # Going back to a composition of late is common (a batch each), and its programs are still good.
        key = self._key()
        if not self._programs.restore(key):
            self._lower_slots(active)
            self._programs.keep(key, active, self._slots.values())
        # Hooks of side networks cost at every call, so they are on only while one has a program.
        self._side.attend()
        # What acts on the inputs rather than at a site: prefixes may stand in some layers only, so rows are by path.
        self._hooks.rows = len(pairs)
        self._hooks.measures_past = self._inputs.set_prefixes(
            active, lambda path: [self._row(i, path) for i in range(len(pairs))]
        )
        self._hooks.prompt = self._inputs.prompts(active, pairs)
        if self._hooks.prompt is not None:
            self._hooks.embedding = self.slot(self.sites.embedding)
        # Last, as all the above may raise: only then is what the slots hold known to be this composition.
        self._lowered, self._trains = self._revisions(), self.live

    def _lower_slots(self, active: Mapping[str, Adapter]) -> None:
        paths = dict.fromkeys(p for a in active.values() for p in (*a.module_paths, *a.saved) if self._is_site(p, a))
        for path in paths:
            slot = self.slot(path)
            if self.routing is not None:
                slot.program = gated_program(self, path, self.routing.experts, self.routing.gate)
                slot.per_row = slot.program is not None
                continue
            slot.program = site_program(self, path, self.rows)
            slot.per_row = slot.program is not None and weighs_rows(slot.program)
            slot.lay_out()

    def _key(self) -> Hashable | None:
        """What the slots' programs are made of; None for those that are not worth keeping, or that train."""
        adapters = [self.adapters[name] for name in self._names]
        if len(self.rows) > 1 or self.routing is not None or self._tensors() or self.live:
            return None
        if any(FINAL in (*a.paths, *a.saved) for a in adapters) or (made_of := stamps(adapters)) is None:
            return None
        return self.rows, tuple(self.weights.items()), self._revisions(), made_of

    def adapter_changed(self) -> None:
        """Lower anew at once, if what is active has changed and does not train: calls then find all in place."""
        self._trains = self.live
        if self._lowered is not None and not self._trains and self._lowered != self._revisions():
            self.refresh()

    def _before_call(self) -> None:
        if torch.compiler.is_compiling() and self._lowered is not None and not self._trains:
            return  # a look at revisions would compile each of them; adapters tell when they change
        if self.live or self._lowered != self._revisions():  # live parameters have moved since the last lowering
            self.refresh()

    def _revisions(self) -> tuple[Any, ...]:
        revisions = ((name, self.adapters[name].revision) for name in self._names)
        return self.model.device, self.model.config._attn_implementation, *revisions

    def _is_site(self, path: str, adapter: Adapter) -> bool:
        return path in adapter.saved or not (adapter.prefix(path) or adapter.prompt())

    @property
    def live(self) -> bool:
        """Whether an active adapter is training."""
        return any(self.adapters[n].trainable for n in self._names)

    def _only_sides_learn(self) -> bool:
        """Whether no gradient is asked for inside the backbone: side networks and heads stand outside it."""
        active = (self.adapters[n] for n in self._names)
        learning = [a for a in active if a.trainable]
        return bool(learning) and all(
            set(a.paths) <= {FINAL} and not any(self._side.holds(self.model.get_submodule(p)) for p in a.saved)
            for a in learning
        )

    def slot(self, path: str) -> Slot:
        """The slot at ``path``, put in place on first use."""
        if path == FINAL:
            return cast("Slot", self._side)
        if path not in self._slots:
            slot = Slot(self.model.get_submodule(path), self.context)
            slot.train(slot.base_layer.training)
            replace_module(self.model, path, slot)
            self._slots[path] = slot
        return self._slots[path]

    def _keep_merged(self, call: Call, make: Callable[[], Merged]) -> None:
        """Make a merged adapter resident under the call's text, unless it is there and its members are as they were."""
        name = str(call)
        stamp = stamps([self.adapters[n] for n in call.refs])
        if name not in self.adapters or stamp is None or self._stamps.get(name) != stamp:
            self.add(name, make().adapter)
            self._stamps[name] = stamp

    # -- rows -----------------------------------------------------------------------------------------------------

    def _tensors(self) -> list[Tensor]:
        return [w for w in self.weights.values() if isinstance(w, Tensor)]

    def _row_count(self) -> int:
        """Rows told apart by the expressions or by the weights given by name."""
        return max([len(self.rows), *(w.shape[0] for w in self._tensors())])

    def _row(self, i: int, path: str | None = None) -> Row:
        """Adapters of row i (at ``path``, or anywhere) with that row's weights (a number, or (T,) per token)."""
        expr = self.rows[i if len(self.rows) > 1 else 0]
        pairs = flatten(expr, self.weights, lambda call: path is None or covers(self.sites, call, path))
        return [(c[i] if isinstance(c, Tensor) else c, n) for c, n in pairs]

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Put everything back."""
        self.rows, self.weights, self.routing = (IDENTITY,), {}, None
        self.refresh()
        for path, slot in self._slots.items():
            replace_module(self.model, path, slot.base_layer)
        self._inputs.close()
        self._hooks.close()
        del self.model._modules["moduloom_adapters"]
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._slots.clear()
        self.adapters.clear()


def _key(name: str) -> str:
    """An adapter's key among the submodules, where "train" or "a.b" could not stand."""
    return "@" + name.replace(".", "\u00b7")


# -- functions over a model --------------------------------------------------------------------------------------


def runtime(model: PreTrainedModel) -> Runtime:
    """The runtime of ``model``; the first call injects it and freezes the base."""
    there = model.__dict__.get(_HOME)
    if there is None:
        there = model.__dict__[_HOME] = Runtime(model)
    return cast("Runtime", there)


def activate(
    model: PreTrainedModel, expr: ExprLike | Sequence[ExprLike], *, weights: Mapping[str, Coefficient] | None = None
) -> None:
    """Make a composition active; see :func:`compose.activate`."""
    rows = as_rows(expr)
    home = runtime(model)
    plans = {row: plan(row, lambda name: Leaf.of(home.adapter(name))) for row in dict.fromkeys(rows)}
    home.activate([plans[row].expression for row in rows], dict(weights or {}))


def route(model: PreTrainedModel, experts: Sequence[ExprLike], gate: Gate | Mixer) -> None:
    """Let a gate weigh experts at each site; see :func:`compose.route`."""
    home = runtime(model)
    trees = as_rows(list(experts))
    plans = {tree: plan(tree, lambda name: Leaf.of(home.adapter(name))) for tree in dict.fromkeys(trees)}
    home.route([plans[tree].expression for tree in trees], gate)


def eject(model: PreTrainedModel) -> None:
    """Restore modules, parameters and requires_grad flags as they were before the first adapter."""
    home = model.__dict__.pop(_HOME, None)
    if home is not None:
        home.close()
