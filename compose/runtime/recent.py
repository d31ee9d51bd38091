"""Compositions that were active last: going back to one lowers nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from compose.runtime.composition import Composition

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
