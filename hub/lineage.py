"""Who comes from whom, as a networkx DAG: parents and requirements, cycles, reachability, order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx as nx

from hub.errors import GateError, NotFound
from hub.ref import AdapterRef
from hub.resolve import choose

if TYPE_CHECKING:
    from hub.store import Store

REQUIRES = "requires"
PARENT = "parent"


def graph(store: Store) -> nx.DiGraph[str]:
    """All artifacts of a store and what they point at.

    Returns
    -------
    networkx.DiGraph
        Nodes are manifest digests with the attribute ``ref``; what is not in the store is a node named by its ref
        text, with ``missing=True``. Edges go from an artifact to what it requires or comes from, with the
        attribute ``relation`` (``requires`` or ``parent``).
    """
    found: nx.DiGraph[str] = nx.DiGraph()
    for artifact in store.list(yanked=True):
        found.add_node(artifact.digest, ref=str(artifact.ref), missing=False)
    for source, relation, target, digest in store.edges():
        node = _node(store, target, digest)
        if node not in found:
            found.add_node(node, ref=target, missing=True)
        found.add_edge(source, node, relation=relation)
    return found


def _node(store: Store, target: str, digest: str | None) -> str:
    if digest is not None:
        return digest
    ref = AdapterRef.parse(target)
    try:
        return choose(ref, store.catalogue(ref.id)).digest
    except NotFound:
        return target


def order(found: nx.DiGraph[str], roots: Iterable[str]) -> list[str]:
    """Nodes that the roots require, directly or not, each after all that it requires itself; roots included.

    Raises
    ------
    GateError
        Artifacts that require each other, naming the cycle.
    """
    needs = nx.subgraph_view(found, filter_edge=lambda a, b: found.edges[a, b]["relation"] == REQUIRES)
    reach = set(roots)
    for root in list(reach):
        reach |= nx.descendants(needs, root)
    part = needs.subgraph(reach)
    try:
        return list(reversed(list(nx.lexicographical_topological_sort(part))))
    except nx.NetworkXUnfeasible as error:
        cycle = [str(part.nodes[a]["ref"]) for a, _ in nx.find_cycle(part)]
        raise GateError(f"artifacts require each other: {' -> '.join([*cycle, cycle[0]])}", ref=cycle[0]) from error


def reachable(found: nx.DiGraph[str], roots: Iterable[str]) -> set[str]:
    """All nodes that the roots point at by any relation, roots included: what a collector must keep."""
    kept = set(roots)
    for root in list(kept):
        kept |= nx.descendants(found, root)
    return kept


def ancestry(found: nx.DiGraph[str], digest: str) -> list[str]:
    """Nodes that an artifact comes from (relation ``parent``), nearest first."""
    parents = nx.subgraph_view(found, filter_edge=lambda a, b: found.edges[a, b]["relation"] == PARENT)
    return [node for _, node in nx.bfs_edges(parents, digest)]
