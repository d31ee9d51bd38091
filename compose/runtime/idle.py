"""Active places that do not run: an adapter whose layer is never called does nothing, and must not do so in silence.

Some modules read the weight of a layer inside them and never call it (``nn.MultiheadAttention`` its ``out_proj``, Mamba
its ``dt_proj``). The first call after a place has become active is watched: what ran, what ran around it, and whose
weight was read. A place whose weight was read while its forward stayed out has been passed over, which is an error; one
that stayed out while the module around it ran may be an expert that no token chose, which is a warning.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from compose.errors import IdleWarning, SiteBypassed
from compose.slots.branches import stages
from compose.slots.call import Call
from compose.slots.slot import Program
from compose.slots.stage import Entry

_PATIENCE = 8  # calls after which a place that nothing was heard of is not watched any more
_NOTHING: AbstractContextManager[None] = nullcontext()


class Watch:
    """Which places of one model are known to run: in training and in evaluation, where models take other ways."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[bool, set[str]] = {True: set(), False: set()}
        self._calls: dict[str, int] = {}
        self._settled: tuple[Any, bool] | None = None  # the composition last found to have no unknown place
        self._busy = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_busy": None, "_settled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._busy = threading.Lock()

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """No call is under watch for a while, in any thread."""
        with self._busy:
            yield

    def over(self, call: Call) -> AbstractContextManager[None]:
        """Watch a call, if some place of its composition is unknown."""
        if torch.compiler.is_compiling():
            return _NOTHING
        composition, mode = call.composition, self.model.training
        if self._settled is not None and self._settled[0] is composition and self._settled[1] == mode:
            return _NOTHING
        known = self._known[mode]
        places = [path for path, program in composition.programs.items() if program.node is not None]
        unknown = {p for p in (*places, *composition.prefixes) if p not in known and not p.startswith("@")}
        unknown = {p for p in unknown if self._calls.get(p, 0) < _PATIENCE and self._holds_something(p)}
        if not unknown:
            self._settled = composition, mode
            return _NOTHING
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in self.model.modules()):
            return _NOTHING  # what is watched would be compiled again
        return _Watched(self, call, unknown)

    def _holds_something(self, path: str) -> bool:
        return next(self.model.get_submodule(path).parameters(), None) is not None

    def judge(self, call: Call, unknown: set[str], around: set[str], read: set[str]) -> None:
        """What a call without error has shown: ``around`` are the places whose surroundings ran."""
        self._known[self.model.training] |= unknown - call.waiting
        for place in unknown:
            self._calls[place] = self._calls.get(place, 0) + 1
        left, composition = call.waiting & around, call.composition
        passed = sorted(p for p in left if p in composition.prefixes or (p in read and _acts(composition.programs[p])))
        if passed:
            for place in passed:
                self._calls[place] = 0  # as long as it is active, each call says so
            raise self._bypassed(passed, composition.programs)
        idle = sorted(p for p in left if p not in read)
        if idle:
            self._calls.update(dict.fromkeys(idle, _PATIENCE))  # said once
            warnings.warn(
                f"{_named(idle)} did not run, though what is around did: {_who(idle, composition.programs)} did "
                "nothing there in this call. Experts that no token chose and inputs that were not given are such "
                "places; if these never run, leave them out of target_modules",
                IdleWarning,
                stacklevel=6,
            )

    def _bypassed(self, places: list[str], programs: Mapping[str, Program]) -> SiteBypassed:
        if places[0] not in programs:
            return SiteBypassed(
                f"{_named(places)} ran without transformers' attention interface, where a prefix comes in: the prefix "
                "did nothing",
                hint='load the base with attn_implementation="sdpa"',
            )
        reader = type(_around(self.model, places[0])).__name__
        last = places[0].rpartition(".")[2]
        return SiteBypassed(
            f"{reader} reads the weight of {_named(places)} and never calls the layer: {_who(places, programs)} does "
            "nothing there",
            hint=f"leave it out: target_modules without {last!r}; a trained adapter may be limited to other places by "
            "at(NAME, sites=[...])",
        )


class _Watched:
    """One call under watch."""

    def __init__(self, watch: Watch, call: Call, unknown: set[str]) -> None:
        self._watch, self._call, self._unknown = watch, call, unknown
        self._around: set[str] = set()
        self._tables: dict[str, tuple[nn.Module, dict[str, Any], _Recorded]] = {}
        self._hooks: list[Any] = []
        self._mine = False

    def __enter__(self) -> None:
        self._mine = self._watch._busy.acquire(blocking=False)
        if not self._mine:
            return  # a call in another thread is watched; a later one will be
        self._call.waiting = set(self._unknown)
        model, inside = self._watch.model, self._call.composition.programs
        for path in self._unknown:
            module = model.get_submodule(path)
            parent = _around(model, path) if path in inside else module
            self._hooks.append(parent.register_forward_pre_hook(_Heard(path, self._around)))
            if path in inside:
                own, recorded = module._parameters, _Recorded(module._parameters)
                self._tables[path] = module, own, recorded
                module.__dict__["_parameters"] = recorded

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._mine:
            return
        try:
            for hook in self._hooks:
                hook.remove()
            for module, own, recorded in self._tables.values():
                own.clear()
                own.update(recorded)  # a module may have exchanged its weight (RWKV does, at its first call)
                module.__dict__["_parameters"] = own
        finally:
            self._watch._busy.release()
        if kind is None:
            read = {path for path, (_, _, recorded) in self._tables.items() if recorded.read}
            self._watch.judge(self._call, self._unknown, self._around, read)


class _Recorded(dict[str, Any]):
    """Parameters that tell whether one was asked for by name."""

    read = False

    def __getitem__(self, name: str) -> Any:
        self.read = True
        return super().__getitem__(name)


class _Heard:
    """Notes that the surroundings of a place run."""

    def __init__(self, path: str, around: set[str]) -> None:
        self._path, self._around = path, around

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._around.add(self._path)


def _around(model: nn.Module, path: str) -> nn.Module:
    """The nearest module around ``path`` that is called: lists and dictionaries of modules are not."""
    parent = path.rpartition(".")[0]
    while parent and isinstance(model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
        parent = parent.rpartition(".")[0]
    return model.get_submodule(parent)


def _acts(program: Program) -> bool:
    """Whether a program can change anything: pairs that are zero do not, unless they are to learn."""
    return any(entry.live or _is_something(entry) for stage in stages(program.node) for entry in stage.entries)


def _is_something(entry: Entry) -> bool:
    a = entry.atoms
    zero = a.is_pair and not (_any(a.A) and _any(a.B))
    return not zero


def _any(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.detach().any())


def _named(places: list[str], most: int = 4) -> str:
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def _who(places: Iterable[str], programs: Mapping[str, Program]) -> str:
    entries = [e for p in places if p in programs for stage in stages(programs[p].node) for e in stage.entries]
    names = sorted({e.name for e in entries})
    return f"adapter {', '.join(map(repr, names))}" if names else "what is active"
