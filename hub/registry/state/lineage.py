"""The lineage of an artifact as a small graph: who it comes from and needs, and who comes from it and needs it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from hub.errors import NotFound
from hub.ref import AdapterRef, name_key
from hub.storage.releases import choose
from hub.store import Store

MAX_NODES = 40
MAX_STEPS = 4  # generations up and down

Edge = tuple[str, str, str]  # from, to, relation ("parent" or "requires"): what it comes from or needs


_NOT_NAME = re.compile(r"[@<>=!~\s]")  # ends the name in a ref


class _Pointer(NamedTuple):
    source: str
    relation: str
    target: str
    digest: str | None


@dataclass(frozen=True)
class Node:
    """A box: what it says on two lines, where it leads, and whether it is the artifact the page is about."""

    key: str
    label: str
    note: str
    href: str | None = None
    here: bool = False


@dataclass
class Graph:
    """Nodes by key and edges among them."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)


class Relations:
    """Who points at whom in a store, both ways; read again when the store's log has grown."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._size = -1
        self._out: dict[str, list[_Pointer]] = {}  # digest -> what it points at
        self._in: dict[str, list[_Pointer]] = {}  # digest or name -> what points at it

    def around(self, digest: str, describe: Callable[[str], Node | None]) -> Graph:
        """Neighbourhood of an artifact.

        Parameters
        ----------
        digest
            Of the artifact.
        describe
            Gives the box of a digest or ref text; None for what the caller may not see.
        """
        self._refresh()
        graph = Graph()
        if own := describe(digest):
            graph.nodes[digest] = own
        for step in (self._above, self._below):
            frontier = [digest]
            for _ in range(MAX_STEPS):
                edges = [edge for key in frontier for edge in step(key)]
                graph.edges += edges
                frontier = []
                for key in (key for edge in edges for key in edge[:2]):
                    if key not in graph.nodes and len(graph.nodes) < MAX_NODES and (node := describe(key)):
                        graph.nodes[key] = node
                        frontier.append(key)
        graph.edges = [edge for edge in dict.fromkeys(graph.edges) if {edge[0], edge[1]} <= graph.nodes.keys()]
        return graph

    def _above(self, digest: str) -> list[Edge]:
        return [(digest, self._resolve(pointer), pointer.relation) for pointer in self._out.get(digest, ())]

    def _below(self, digest: str) -> list[Edge]:
        here = self.store.list(digest=digest, yanked=True)
        names = [digest, *(name_key(artifact.facts.name) for artifact in here)]
        pointers = [pointer for name in names for pointer in self._in.get(name, ())]
        return [(each.source, digest, each.relation) for each in pointers if self._resolve(each) == digest]

    def _resolve(self, pointer: _Pointer) -> str:
        """Digest that is pointed at today; the ref itself where nothing here fits it."""
        if pointer.digest is not None:
            return pointer.digest
        ref = AdapterRef.parse(pointer.target)
        try:
            return choose(ref, self.store.catalogue(ref.id)).digest
        except NotFound:
            return pointer.target

    def _refresh(self) -> None:
        size = self.store.ledger.size
        if size == self._size:
            return
        out, into = defaultdict(list), defaultdict(list)
        for source, relation, target, digest in self.store.edges():
            pointer = _Pointer(source, relation, target, digest)
            out[source].append(pointer)
            into[digest or name_key(_NOT_NAME.split(target, maxsplit=1)[0])].append(pointer)
        self._out, self._in, self._size = dict(out), dict(into), size
