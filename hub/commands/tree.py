"""``hub tree``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import json_option, print_json

if TYPE_CHECKING:
    import networkx as nx

_WORDS = {"requires": "requires", "parent": "from"}
_INVERTED = {"requires": "required by", "parent": "parent of"}
_STYLE = (
    "svg{font:14px system-ui,sans-serif;color:#1f2328;background:#fff}.node rect{fill:#f6f8fa;stroke:#8c959f}"
    ".here rect{fill:#ddf4ff;stroke:#0969da}.gone rect{stroke-dasharray:4}.note{fill:#59636e;font-size:12px}"
    ".edge{fill:none;stroke:#59636e;stroke-width:1.5}.requires{stroke:#0969da}.tip{fill:#59636e}"
)


@click.command()
@click.argument("ref")
@click.option("--invert", is_flag=True, help="What requires it or comes from it, instead.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "dot", "svg", "json"]),
    default="text",
    show_default=True,
    help="text, or a graph to draw (dot, svg) or to read (json).",
)
@json_option
def tree(ref: str, invert: bool, format_: str, as_json: bool) -> None:
    """Show what an artifact requires and comes from, down to the roots.

    \b
    hub tree acme/both
    hub tree acme/tone@1.0.0 --invert              (who would miss it)
    hub tree acme/both --format svg > both.svg

    What is not in the store is marked as missing; what was shown already is not shown again.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.relations import lineage
    from hub.store import Store

    store = Store()
    root = store.get(ref)
    graph = lineage.below(store, root) if invert else lineage.above(store, root)
    if as_json or format_ == "json":
        print_json(_document(graph, root.digest))
    elif format_ == "svg":
        click.echo(_svg(graph, root.digest))
    else:
        for line in _dot(graph, root.digest) if format_ == "dot" else _text(graph, root.digest, invert):
            click.echo(line)


def _document(graph: nx.DiGraph[str], root: str) -> dict[str, Any]:
    nodes = [{"id": node, **facts} for node, facts in graph.nodes(data=True)]
    edges = [{"source": a, "target": b, "relation": facts["relation"]} for a, b, facts in graph.edges(data=True)]
    return {"root": root, "nodes": nodes, "edges": edges}


def _title(facts: dict[str, Any]) -> str:
    if facts["missing"]:
        return f"{facts['ref']} (missing)"
    yanked = "" if facts["yanked"] is None else f", yanked: {facts['yanked']}"
    return f"{facts['ref']} ({facts['kind']}{yanked})"


def _text(graph: nx.DiGraph[str], root: str, invert: bool) -> Iterator[str]:
    words = _INVERTED if invert else _WORDS
    near: Callable[[str], Iterator[str]] = graph.predecessors if invert else graph.successors
    shown: set[str] = set()

    def relation(node: str, other: str) -> str:
        return str((graph.edges[other, node] if invert else graph.edges[node, other])["relation"])

    def lines(node: str, indent: str) -> Iterator[str]:
        shown.add(node)
        children = sorted(
            near(node), key=lambda other: (relation(node, other) != "requires", graph.nodes[other]["ref"])
        )
        for child in children:
            last = child == children[-1]
            again = child in shown and any(True for _ in near(child))
            head = f"{words[relation(node, child)]} {_title(graph.nodes[child])}{' (above)' if again else ''}"
            yield f"{indent}{'└── ' if last else '├── '}{head}"
            if child not in shown:
                yield from lines(child, indent + ("    " if last else "│   "))

    yield _title(graph.nodes[root])
    yield from lines(root, "")


def _dot(graph: nx.DiGraph[str], root: str) -> Iterator[str]:
    quote = json.dumps  # the string syntax of dot is a part of JSON's
    yield "digraph lineage {"
    yield "  rankdir=LR; node [shape=box];"
    for node, facts in graph.nodes(data=True):
        style = "dashed" if facts["missing"] else "bold" if node == root else "solid"
        yield f"  {quote(node)} [label={quote(_title(facts))}, style={style}];"
    for a, b, facts in graph.edges(data=True):
        style = "solid" if facts["relation"] == "requires" else "dashed"
        yield f"  {quote(a)} -> {quote(b)} [label={quote(facts['relation'])}, style={style}];"
    yield "}"


def _svg(relations: nx.DiGraph[str], root: str) -> str:
    from hub.registry.state.lineage import Graph, Node
    from hub.registry.web.lineage_svg import svg

    graph = Graph(edges=[(a, b, facts["relation"]) for a, b, facts in relations.edges(data=True)])
    for node, facts in relations.nodes(data=True):
        note = "missing" if facts["missing"] else facts["kind"]
        href = None if facts["missing"] else f"#{node}"
        graph.nodes[node] = Node(node, facts["ref"], note, href, here=node == root)
    head, end, rest = svg(graph).partition(">")
    return f"{head}{end}<style>{_STYLE}</style>{rest}"
