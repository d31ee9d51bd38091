"""Inject, activate, eject: the life of adapters inside a frozen model.

``model.moduloom`` holds the runtime: which adapters are resident, which composition is active. Slots stand in the
forwards of base layers where some adapter acts, until :func:`eject` puts every forward and every flag back as it was;
modules and parameters never move, so whatever reads the model finds the base.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.algebra import ExprLike, as_rows
from compose.base.fingerprint import ADAPTERS
from compose.base.given import bare_model
from compose.base.quantization import keep_differentiable
from compose.base.sites import FINAL, SiteMap
from compose.base.weights import offloaded
from compose.errors import KindError
from compose.expr.tree import Expr, add
from compose.kernels.coefficients import Coefficient, check_coefficients
from compose.kind.adapter import Adapter
from compose.parameter_space.certificate import Certificate
from compose.planning.plan import Leaf, plan
from compose.runtime.activation import Activation
from compose.runtime.bank import Bank
from compose.runtime.calls import ModelCalls
from compose.runtime.composition import Composition
from compose.runtime.draft import Draft, Merges
from compose.runtime.filling import Filling
from compose.runtime.inputs import Inputs
from compose.runtime.prefixes import use_interface
from compose.runtime.recent import Leaves, RecentCompositions
from compose.runtime.row_places import RowPlaces
from compose.runtime.row_trials import untouched
from compose.slots.call import Call, Context
from compose.slots.gate import Gate, Mixer, Routing, refuse_outside
from compose.slots.side import SideSlot
from compose.slots.slot import Slot
from hub.errors import NotFound, UsageError, did_you_mean, suggest

_HOME = "moduloom"  # attribute of the model that holds the runtime


class Runtime:
    """Adapters and slots of one model, and the composition that is active."""

    def __init__(self, model: PreTrainedModel) -> None:
        keep_differentiable(model)
        self.model = model
        self.sites = SiteMap(model)
        self.context = Context()
        self.adapters: dict[str, Adapter] = {}
        self.merges: Merges = {}
        self.side = SideSlot(model, self.sites, self.context)
        self.inputs = Inputs(model, self.sites, self.context)
        self._slots: dict[str, Slot] = {}
        self._recent = RecentCompositions()
        self.leaves = Leaves()
        self._attention = ""  # the implementation that was on when the composition was made active
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._bank = Bank()
        self._calls = ModelCalls(model, self.sites, self.context, self._before_call)
        self._places = RowPlaces(model, self.sites, self._at_rest)
        self._filling = Filling(model, self.sites, self._at_rest, self._calls.with_prompt)
        self._lock = threading.RLock()
        self._owner: tuple[str, int] | None = None  # who alone may use it, and in which thread
        self._asked = Composition()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model (copy.deepcopy, pickle) makes its composition anew, at its first call.
        asked = Composition(self.rows, self.weights, self.routing)
        return {**self.__dict__, "_lock": None, "_owner": None, "merges": {}, "_asked": asked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        for adapter in self.adapters.values():
            adapter.home = weakref.ref(self)

    # -- whose it is -----------------------------------------------------------------------------------------------

    @contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        """Until the end only this thread may change what is active or call the model; others are refused.

        Owners wait for each other.
        """
        with self._lock:
            before, self._owner = self._owner, (owner, threading.get_ident())
            try:
                yield
            finally:
                self._owner = before

    @contextmanager
    def _mine(self) -> Iterator[None]:
        self._refuse_others()
        with self._lock:
            yield

    def _refuse_others(self) -> None:
        owner = self._owner
        if owner is not None and owner[1] != threading.get_ident():
            raise KindError(
                f"{owner[0]} computes on this model",
                hint="ask it (Engine.run, Engine.call), or wait until it is at rest",
            )

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
        with self._mine():
            draft = Draft(self, self.weights, {name: self._settled(adapter, name)})
            if name in self.composition.origin.members or any(name in row.refs for row in self.rows):
                draft.repeat_merges(self.rows)
                self._take(draft, draft.compose(self.rows, self.routing))
            else:
                self._take(draft, None)
            self._recent.drop(name)
            self.leaves.drop(name)
        return adapter

    def _settled(self, adapter: Adapter, name: str) -> Adapter:
        adapter.name = name
        adapter.home = weakref.ref(self)
        adapter.count_changes()
        adapter.to(self.model.device).train(self.model.training)
        return adapter

    def remove(self, name: str) -> None:
        """Let a resident adapter go. It must not be active."""
        with self._mine():
            self.adapter(name)
            if any(name in row.refs for row in self.rows):
                raise KindError(f"adapter {name!r} is active", hint="activate something else first")
            with self._or_as_it_was():
                del self.adapters[name]
                self._bank.hold(self.adapters)
                self.merges.pop(name, None)
                self._recent.drop(name)
                self.leaves.drop(name)
            self.leaves.drop(name)

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

    @property
    def composition(self) -> Composition:
        """What is active."""
        active = self.context.idle.composition
        return active if isinstance(active, Composition) else self._asked

    @property
    def rows(self) -> tuple[Expr, ...]:
        """The active expressions, one for all rows of a batch or one for each; merges in them have become residents."""
        return self.composition.rows

    @property
    def weights(self) -> Mapping[str, Coefficient]:
        """The active weights by name."""
        return self.composition.weights

    @property
    def routing(self) -> Routing | None:
        """The active experts with their gate, or None."""
        return self.composition.routing

    def activate(
        self, rows: Sequence[Expr], weights: Mapping[str, Coefficient], routing: Routing | None = None
    ) -> Activation:
        """Make these rows active (one: for all rows of any batch). On an error what was active stays active."""
        for name in weights:
            self.adapter(name)
        check_coefficients(len(rows), weights)
        with self._mine():
            draft = Draft(self, weights, {})
            lowered = draft.lower(rows)
            self._activate(draft, lowered, routing)
            return Activation(self._certificates(lowered))

    def _certificates(self, lowered: Sequence[Expr]) -> dict[str, Certificate]:
        active = (self.merges[name] for row in lowered for name in row.refs if name in self.merges)
        return {text: loss for m in active for text, loss in (*m.inner.items(), (str(m.call), m.certificate))}

    def route(self, experts: Sequence[Expr], gate: Gate | Mixer) -> None:
        """Make these experts active, weighed by a gate at each site. On an error what was active stays active."""
        with self._mine():
            draft = Draft(self, {}, {})
            lowered = draft.lower(experts)
            for name in dict.fromkeys(name for expert in lowered for name in expert.refs):
                refuse_outside(draft.adapters[name])
            self._activate(draft, (add(*lowered),), Routing(lowered, gate))

    def activate_again(self, composition: Composition) -> bool:
        """Make active what was so before, if its adapters are as they were and do not train; whether it is."""
        with self._mine():
            changed = composition.trains or composition.device != self.model.device
            if changed or composition.origin.changed(self.adapters, values=self._owner is None):
                return False
            self._take(Draft(self, composition.weights, {}), composition)
            return True

    def _activate(self, draft: Draft, rows: tuple[Expr, ...], routing: Routing | None) -> None:
        # Going back to a composition of late is common (a batch each), and what it has laid out is still good.
        key = self._key(rows, draft.weights, routing)
        composition = self._recent.get(key)
        if composition is None or composition.device != self.model.device or composition.origin.changed(draft.adapters):
            composition = draft.compose(rows, routing)
        self._take(draft, composition)
        self._recent.keep(None if composition.trains else key, composition)

    @staticmethod
    def _key(rows: tuple[Expr, ...], weights: Mapping[str, Coefficient], routing: Routing | None) -> Hashable | None:
        """What was asked for; None for what is not worth keeping."""
        if len(rows) > 1 or routing is not None or any(isinstance(w, Tensor) for w in weights.values()):
            return None
        return rows, tuple(weights.items())

    def _take(self, draft: Draft, composition: Composition | None) -> None:
        """Make a draft's residents the model's own, and its composition active."""
        if composition is not None:
            self._stand_where(composition)
            self._places.before(composition, self.slot, self._filling.check)
        for name, adapter in draft.adapters.items():
            if self.adapters.get(name) is not adapter:
                self._settled(adapter, name)
        with self._or_as_it_was():
            self.adapters.update(draft.adapters)
            self._bank.hold(self.adapters)
            self.merges.update(draft.merges)
            if composition is not None:
                self.context.take(composition)
        if composition is not None and not composition.prefixes and not self.context.running:
            use_interface(self.model, on=False)
        self._attention = self.model.config._attn_implementation

    def _stand_where(self, composition: Composition) -> None:
        """Be in every forward where this composition acts; as long as it is not active, nothing comes of that."""
        for path in composition.programs:
            (self.side if path == FINAL else self._slots[path]).enter()
        if composition.prefixes:
            use_interface(self.model, on=True)
        self.inputs.enter(composition.prefixes, moves=composition.shift is not None)
        if composition.prompt is not None:
            embedding = self.slot(self.sites.embedding)
            embedding.takes_prompt = True
            embedding.enter()

    @contextmanager
    def _or_as_it_was(self) -> Iterator[None]:
        """Undo what happens inside if it does not come to its end, be it by Ctrl-C."""
        adapters, merges, idle = dict(self.adapters), dict(self.merges), self.context.idle
        try:
            yield
        except BaseException:
            self.context.idle = idle
            for mine, before in ((self.adapters, adapters), (self.merges, merges)):
                mine.clear()
                mine.update(before)  # type: ignore[arg-type]
            self._bank.hold(self.adapters)
            raise

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Afterwards what is active, and who is resident, is as before: for trying one composition after another."""
        active, residents = (self.rows, self.weights, self.routing), set(self.adapters)
        try:
            yield
        finally:
            self._activate(Draft(self, active[1], {}), active[0], active[2])
            for name in self.adapters.keys() - residents:
                self.remove(name)

    def refresh(self, *, anew: bool = False) -> None:
        """Make the active composition anew; ``anew``: also what seems to be as it was."""
        with self._mine():
            active = self.composition
            if anew:
                self._recent, self.leaves = RecentCompositions(), Leaves()
                self.merges = {name: replace(m, origin=m.origin.outdated()) for name, m in self.merges.items()}
            draft = Draft(self, active.weights, {})
            draft.repeat_merges(active.rows)
            self._take(draft, draft.compose(active.rows, active.routing))

    def adapter_changed(self) -> None:
        """Make the composition anew at once, if it has changed and does not train: calls then find all in place."""
        if self.composition.device is not None and not self.live and self._is_stale():
            self.refresh()

    def _before_call(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        self._renew()
        self._places.before_call(module, given)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The bare base for a while, as if nothing were active, for a call that leaves nothing behind."""
        idle = self.context.idle
        call = Call(Composition(), idle.batch, idle.lengths)
        with self._lock, self._calls.watch.kept_out(), untouched(self.model):
            try:
                self.context.begin(call)
                yield
            finally:
                self.context.end(call)

    def _renew(self) -> None:
        if torch.compiler.is_compiling() and self.composition.device is not None and not self.composition.trains:
            return  # a look at adapters would compile each of them; they tell when they change
        self._refuse_others()
        if self._is_stale():
            with self._lock:
                if self._is_stale():
                    self.refresh()

    def _is_stale(self) -> bool:
        composition = self.composition
        return (
            composition.trains  # live parameters have moved since the last call
            or composition.device != self.model.device
            or self._attention != self.model.config._attn_implementation
            # Who owns the model changes no adapter in place; a look at the tensors of 32 LoRAs is 5 ms of each step.
            or composition.origin.changed(self.adapters, values=self._owner is None)
        )

    @property
    def live(self) -> bool:
        """Whether an active adapter is training."""
        return any(self.adapters[name].trainable for row in self.rows for name in row.refs)

    def prompt_places(self, batch: int) -> Tensor | None:
        """Which of the n places in front of the texts of a batch the active prompts take, (B, n); None without any."""
        prompt = self.composition.prompt
        return None if prompt is None else prompt.on(batch).mask()

    def slot(self, path: str) -> Slot:
        """The slot at ``path``; it stands in the layer's forward once a composition acts there."""
        if path == FINAL:
            return cast("Slot", self.side)
        slot = self._slots.get(path)
        if slot is None or slot.layer is not self.model.get_submodule(path):  # as after resize_token_embeddings
            slot = self._slots[path] = Slot(self.model.get_submodule(path), path, self.context)
        return slot

    # -- begin and end ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Freeze the base and stand in the model's calls."""
        try:
            for parameter, _ in self._flags:
                parameter.requires_grad_(False)
            self.model.add_module(ADAPTERS, self._bank)
            self._calls.enter()
            self.model.__dict__[_HOME] = self
        except BaseException:
            self._undo()
            raise

    def close(self) -> None:
        """Put everything back; on an interruption all is as it was."""
        with self._mine():
            idle = self.context.idle
            try:
                self.context.take(Composition())
                self._undo()
            except BaseException:
                self.open()
                self.context.idle = idle
                for slot in self._slots.values():
                    slot.enter()
                self._stand_where(self.composition)
                raise
        self.adapters.clear()

    def _undo(self) -> None:
        for slot in self._slots.values():
            slot.leave()
        self.side.leave()
        self.inputs.leave()
        self._calls.leave()
        use_interface(self.model, on=False)
        self.model._modules.pop(ADAPTERS, None)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self.model.__dict__.pop(_HOME, None)


# -- functions over a model --------------------------------------------------------------------------------------


def runtime(model: PreTrainedModel) -> Runtime:
    """The runtime of ``model``; the first call injects it and freezes the base."""
    found = getattr(model, "__dict__", {}).get(_HOME)
    if found is None:
        model = bare_model(model)
        found = model.__dict__.get(_HOME)
    if found is None:
        if model.device.type == "meta":
            raise offloaded(f"this {type(model).__name__}")
        found = Runtime(model)
        found.open()
    return cast("Runtime", found)


def activate(
    model: PreTrainedModel, expr: ExprLike | Sequence[ExprLike], *, weights: Mapping[str, Coefficient] | None = None
) -> Activation:
    """Make a composition active; see :func:`compose.activate`."""
    rows = as_rows(expr)
    home = runtime(model)
    plans = {row: plan(row, lambda name: Leaf.of(home.adapter(name))) for row in dict.fromkeys(rows)}
    _check_weights(home, rows, weights or {})
    return home.activate([plans[row].expression for row in rows], dict(weights or {}))


def _check_weights(home: Runtime, rows: Sequence[Expr], weights: Mapping[str, Coefficient]) -> None:
    """Refuse a weight of an adapter that stands in no row: it would change nothing."""
    named = {name for row in dict.fromkeys(rows) for name in row.refs}
    for name in weights:
        home.adapter(name)
        if name not in named:
            raise UsageError(
                f"there is a weight for {name!r}, which is not in the expression",
                hint=suggest(name, named) or f"the expression names {', '.join(sorted(named)) or 'no adapter'}",
            )


def route(model: PreTrainedModel, experts: Sequence[ExprLike], gate: Gate | Mixer) -> None:
    """Let a gate weigh experts at each site; see :func:`compose.route`."""
    home = runtime(model)
    trees = as_rows(list(experts))
    plans = {tree: plan(tree, lambda name: Leaf.of(home.adapter(name))) for tree in dict.fromkeys(trees)}
    home.route([plans[tree].expression for tree in trees], gate)


def eject(model: PreTrainedModel) -> None:
    """Restore forwards and requires_grad flags as they were before the first adapter."""
    found = bare_model(model).__dict__.get(_HOME)
    if found is not None:
        found.close()
