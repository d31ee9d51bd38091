"""The lineage of an artifact as a small layered graph, drawn as SVG that takes its colours from the page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from hub.errors import NotFound
from hub.ref import AdapterRef
from hub.storage.releases import choose
from hub.store import Store

MAX_NODES = 40
MAX_STEPS = 4  # generations up and down
_WIDE, _NARROW = 196, 156  # widths of a box, from left to right and from top to bottom
_HEIGHT, _REACH, _GAP, _PAD = 46, 56, 16, 8
_LETTER = 7.1  # width of a letter of a label

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
        found = Graph()
        if own := describe(digest):
            found.nodes[digest] = own
        for step in (self._above, self._below):
            frontier = [digest]
            for _ in range(MAX_STEPS):
                edges = [edge for key in frontier for edge in step(key)]
                found.edges += edges
                frontier = []
                for key in (key for edge in edges for key in edge[:2]):
                    if key not in found.nodes and len(found.nodes) < MAX_NODES and (node := describe(key)):
                        found.nodes[key] = node
                        frontier.append(key)
        found.edges = [edge for edge in dict.fromkeys(found.edges) if {edge[0], edge[1]} <= found.nodes.keys()]
        return found

    def _above(self, digest: str) -> list[Edge]:
        return [(digest, self._resolve(pointer), pointer.relation) for pointer in self._out.get(digest, ())]

    def _below(self, digest: str) -> list[Edge]:
        here = self.store.list(digest=digest, yanked=True)
        names = [digest, *(artifact.facts.name for artifact in here)]
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
            into[digest or _NOT_NAME.split(target, maxsplit=1)[0]].append(pointer)
        self._out, self._in, self._size = dict(out), dict(into), size


def svg(graph: Graph, *, tall: bool = False) -> str:
    """Draw a graph, what others come from first. The result is safe to put into a page.

    Parameters
    ----------
    graph
        At least one node. Colours come from the classes ``node``, ``here``, ``edge``, ``requires``.
    tall
        From top to bottom, for narrow screens; otherwise from left to right.
    """
    shape = "tall" if tall else "wide"
    places = _places(graph, tall)
    box = _NARROW if tall else _WIDE
    width = max(x for x, _ in places.values()) + box + _PAD
    height = max(y for _, y in places.values()) + _HEIGHT + _PAD
    names = ", ".join(node.label for node in graph.nodes.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{shape}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape("Lineage: " + names)}">',
        f'<defs><marker id="tip-{shape}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
    ]
    parts += [_line(places[target], places[source], relation, tall) for source, target, relation in graph.edges]
    parts += [_box(node, places[key], box) for key, node in graph.nodes.items()]
    return "".join([*parts, "</svg>"])


def _places(graph: Graph, tall: bool) -> dict[str, tuple[int, int]]:
    """Top left corner of each box: its layer is the longest way from a root, its rank keeps lines short."""
    above = {key: [target for source, target, _ in graph.edges if source == key] for key in graph.nodes}
    depth = dict.fromkeys(graph.nodes, 0)
    for _ in graph.nodes:  # relaxes to the longest path; stops early, and a cycle cannot hold it up
        changed = False
        for key, targets in above.items():
            wanted = max((depth[target] + 1 for target in targets), default=0)
            if wanted > depth[key] and wanted < len(graph.nodes):
                depth[key], changed = wanted, True
        if not changed:
            break
    layers: dict[int, list[str]] = defaultdict(list)
    for key in sorted(graph.nodes, key=lambda key: (depth[key], graph.nodes[key].label)):
        layers[depth[key]].append(key)
    rank: dict[str, float] = {}
    for layer in sorted(layers):
        mean = {key: _mean([rank[target] for target in above[key] if target in rank]) for key in layers[layer]}
        for place, key in enumerate(sorted(layers[layer], key=lambda key: mean[key])):
            rank[key] = place
    widest = max(len(keys) for keys in layers.values())
    found = {}
    for layer, keys in layers.items():
        for key in keys:
            across = rank[key] + (widest - len(keys)) / 2
            x, y = (across, layer) if tall else (layer, across)
            step_x, step_y = (_NARROW + _GAP, _HEIGHT + _REACH) if tall else (_WIDE + _REACH, _HEIGHT + _GAP)
            found[key] = (round(_PAD + x * step_x), round(_PAD + y * step_y))
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _line(start: tuple[int, int], end: tuple[int, int], relation: str, tall: bool) -> str:
    kind, tip = "edge requires" if relation == "requires" else "edge", "tall" if tall else "wide"
    if tall:
        x1, y1, x2, y2 = start[0] + _NARROW // 2, start[1] + _HEIGHT, end[0] + _NARROW // 2, end[1] - 3
        middle = (y1 + y2) // 2
        curve = f"C{x1} {middle} {x2} {middle} {x2} {y2}"
    else:
        x1, y1, x2, y2 = start[0] + _WIDE, start[1] + _HEIGHT // 2, end[0] - 3, end[1] + _HEIGHT // 2
        middle = (x1 + x2) // 2
        curve = f"C{middle} {y1} {middle} {y2} {x2} {y2}"
    return f'<path class="{kind}" d="M{x1} {y1} {curve}" marker-end="url(#tip-{tip})"/>'


def _shortened(label: str, letters: int) -> str:
    """A name and a version in so many letters: of the two, the name gives way."""
    name, _, version = label.rpartition(" ")
    if len(label) <= letters or not name:
        return label if len(label) <= letters else f"{label[: letters - 1]}…"
    return f"{name[: max(letters - len(version) - 2, 1)]}… {version}"


def _box(node: Node, place: tuple[int, int], width: int) -> str:
    (x, y), letters = place, int((width - 20) / _LETTER)
    label = _shortened(node.label, letters)
    kind = "node here" if node.here else "node" if node.href else "node gone"
    box = (
        f'<g class="{kind}"><title>{escape(node.label)}</title>'
        f'<rect x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" rx="8"/>'
        f'<text class="label" x="{x + 12}" y="{y + 19}">{escape(label)}</text>'
        f'<text class="note" x="{x + 12}" y="{y + 35}">{escape(node.note)}</text></g>'
    )
    return f'<a href="{escape(node.href)}">{box}</a>' if node.href and not node.here else box
