"""Compositions that were active last, and stages of adapters alone: going back to one lowers nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from compose.kind.adapter import Adapter
from compose.runtime.composition import Composition, Origin
from compose.slots.stage import Stage

_ROOM = 8  # compositions; each keeps alive what was laid out for it, at most as much again as its adapters


class RecentCompositions:
    """Compositions by what was asked for: one expression with numbers as weights, none of whose adapters trains."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, Composition] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": OrderedDict()}  # a copy of a model lowers its own adapters

    def get(self, key: Hashable | None) -> Composition | None:
        """The one of this key, which may be of adapters that have changed since."""
        if key is None or key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key]

    def keep(self, key: Hashable | None, composition: Composition) -> None:
        """Remember one; with the key None nothing."""
        if key is None:
            return
        self._held[key] = composition
        self._held.move_to_end(key)
        if len(self._held) > _ROOM:
            self._held.popitem(last=False)

    def drop(self, name: str) -> None:
        """Forget every composition that the adapter ``name`` is in."""
        for key in [key for key, made in self._held.items() if name in made.origin.adapters]:
            del self._held[key]


class Leaves:
    """Stages of frozen adapters alone, by adapter and path; a batch of other rows is stacked from the same ones."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Origin, dict[str, Stage]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}  # a copy of a model lowers its own adapters

    def of(self, name: str, adapter: Adapter) -> dict[str, Stage]:
        """Those of the adapter called ``name`` as it is now: to be looked up, and added to."""
        if adapter.trainable:
            self._held.pop(name, None)
            return {}
        held = self._held.get(name)
        if held is None or held[0].changed({name: adapter}):
            held = self._held[name] = Origin({name: adapter}, {}), {}
        return held[1]

    def drop(self, name: str) -> None:
        """Forget those of an adapter."""
        self._held.pop(name, None)
