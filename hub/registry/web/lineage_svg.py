"""A lineage graph in layers, drawn as SVG that takes its colours from the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape

from hub.registry.state.lineage import Graph, Node

_WIDE, _NARROW = 196, 156  # widths of a box, from left to right and from top to bottom
_HEIGHT, _REACH, _GAP, _PAD = 46, 56, 16, 8
_LETTER = 7.1  # width of a letter of a label


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
    # Layers: each box stands one below the lowest of those it comes from.
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
    # Within a layer, in the order of the mean place of what they come from: that keeps lines from crossing.
    layers: dict[int, list[str]] = defaultdict(list)
    for key in sorted(graph.nodes, key=lambda key: (depth[key], graph.nodes[key].label)):
        layers[depth[key]].append(key)
    rank: dict[str, float] = {}
    for layer in sorted(layers):
        mean = {key: _mean([rank[target] for target in above[key] if target in rank]) for key in layers[layer]}
        for place, key in enumerate(sorted(layers[layer], key=lambda key: mean[key])):
            rank[key] = place
    # Every layer is centred on the widest.
    widest = max(len(keys) for keys in layers.values())
    places = {}
    for layer, keys in layers.items():
        for key in keys:
            across = rank[key] + (widest - len(keys)) / 2
            x, y = (across, layer) if tall else (layer, across)
            step_x, step_y = (_NARROW + _GAP, _HEIGHT + _REACH) if tall else (_WIDE + _REACH, _HEIGHT + _GAP)
            places[key] = (round(_PAD + x * step_x), round(_PAD + y * step_y))
    return places


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


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
