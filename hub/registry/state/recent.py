"""What a busy registry keeps in memory: bounded dictionaries, and catalogues that follow the store's log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from hub.ref import name_key
from hub.storage.ledger import Event, Op, Position
from hub.storage.releases import Catalogue
from hub.store import Store

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A dictionary of bounded size that forgets what was put first; threads share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: dict[K, V] = {}
        self._guard = threading.Lock()

    def get(self, key: K) -> V | None:
        """Value of a key, or None."""
        return self._found.get(key)

    def put(self, key: K, value: V) -> V:
        """Keep a value; returns it."""
        with self._guard:
            self._found[key] = value
            if len(self._found) > self._size:
                del self._found[next(iter(self._found))]
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._guard:
            self._found.clear()


class Catalogues:
    """Catalogues of the names that were asked for; each new line of the log changes the one it is about.

    The store itself brings its index up to the log under its lock before it answers. Readers of a registry must
    not wait for that while others publish, and the log can be read without any lock.
    """

    def __init__(self, store: Store, size: int) -> None:
        self.store = store
        self._found: Recent[str, Catalogue] = Recent(size)
        self._at = store.ledger.end()
        self._guard = threading.Lock()

    def get(self, name: str) -> Catalogue:
        """Releases and aliases of a name, as the log has them now."""
        self._follow()
        name = name_key(name)
        catalogue = self._found.get(name)
        if catalogue is not None:
            return catalogue
        start = self._at
        catalogue = self.store.catalogue(name)  # at least as new as `start`; it may have to wait for a writer
        with self._guard:
            since = [event for event, _ in self.store.ledger.read(start) if name_key(event.name) == name]
            return self._found.put(name, Catalogue.fold(catalogue.name, [*_events(catalogue), *since]))

    def _follow(self) -> None:
        size = self.store.ledger.size
        if size == self._at.offset:
            return
        with self._guard:
            if size < self._at.offset:  # another log has taken its place
                self._found.clear()
                self._at = Position()
            # An event may be applied twice (a catalogue was asked for in between): the second time changes nothing.
            for event, at in self.store.ledger.read(self._at):
                known = self._found.get(name_key(event.name))
                if known is not None:
                    self._found.put(name_key(event.name), Catalogue.fold(known.name, [*_events(known), event]))
                self._at = at


def _events(catalogue: Catalogue) -> Iterator[Event]:
    """Events that lead to a catalogue."""
    for release in catalogue.releases:
        yield Event("publish", catalogue.name, release.digest, version=release.version)
        if release.yanked is not None:
            yield Event("yank", catalogue.name, release.digest, version=release.version, reason=release.yanked)
    for alias, digest in catalogue.aliases.items():
        yield Event("alias", catalogue.name, digest, alias=alias)
    for gone in catalogue.tombstones:
        op: Op = "delete" if gone.final else "evict"
        yield Event(op, catalogue.name, gone.digest, version=gone.version, reason=gone.reason)
