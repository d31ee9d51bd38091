"""Who comes from whom, as a networkx DAG: parents and requirements, cycles, reachability, order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx as nx

from hub.errors import GateError, NotFound
from hub.ref import AdapterRef
from hub.storage.releases import choose

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact
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
    dag: nx.DiGraph[str] = nx.DiGraph()
    for artifact in store.list(yanked=True):
        dag.add_node(artifact.digest, ref=str(artifact.ref), missing=False)
    for source, relation, target, digest in store.edges():
        node = _node(store, target, digest)
        if node not in dag:
            dag.add_node(node, ref=target, missing=True)
        dag.add_edge(source, node, relation=relation)
    return dag


def _node(store: Store, target: str, digest: str | None) -> str:
    if digest is not None:
        return digest
    ref = AdapterRef.parse(target)
    try:
        return choose(ref, store.catalogue(ref.id)).digest
    except NotFound:
        return target


def above(store: Store, root: Artifact) -> nx.DiGraph[str]:
    """What one artifact requires and comes from, directly or not: a part of `graph`, read from manifests alone.

    Nodes that are in the store carry ``kind`` and ``yanked`` as well.
    """
    dag: nx.DiGraph[str] = nx.DiGraph()
    waiting = [root]
    while waiting:
        artifact = waiting.pop()
        _describe(dag, artifact)
        for relation, target, digest in _pointers(artifact):
            node = _node(store, target, digest)
            if node not in dag:
                target_here = next(iter(store.list(digest=node, yanked=True)), None)
                if target_here is None:
                    dag.add_node(node, ref=target, missing=True)
                else:
                    waiting.append(target_here)
                    _describe(dag, target_here)
            dag.add_edge(artifact.digest, node, relation=relation)
    return dag


def below(store: Store, root: Artifact) -> nx.DiGraph[str]:
    """What requires an artifact or comes from it, directly or not; edges point as in `graph`, nodes as in `above`."""
    whole = graph(store)
    dag: nx.DiGraph[str] = nx.DiGraph(whole.subgraph({root.digest, *nx.ancestors(whole, root.digest)}))
    for digest in dag:
        _describe(dag, next(iter(store.list(digest=digest, yanked=True))))
    return dag


def _describe(dag: nx.DiGraph[str], artifact: Artifact) -> None:
    facts = artifact.facts
    what = {"kind": facts.kind or facts.type, "yanked": facts.yanked}
    dag.add_node(artifact.digest, ref=str(artifact.ref), missing=False, **what)


def _pointers(artifact: Artifact) -> list[tuple[str, str, str | None]]:
    """Relation, ref text and digest of what an artifact points at; requirements last, as they count where both hold."""
    manifest = artifact.manifest
    needs = [(REQUIRES, need.name + (need.range or ""), need.digest) for need in manifest.requires]
    parents = manifest.lineage.parents if manifest.lineage else ()
    return [(PARENT, parent, AdapterRef.parse(parent).digest) for parent in parents] + needs


def order(dag: nx.DiGraph[str], roots: Iterable[str]) -> list[str]:
    """Nodes that the roots require, directly or not, each after all that it requires itself; roots included.

    Raises
    ------
    GateError
        Artifacts that require each other, naming the cycle.
    """
    needs = nx.subgraph_view(dag, filter_edge=lambda a, b: dag.edges[a, b]["relation"] == REQUIRES)
    reach = set(roots)
    for root in list(reach):
        reach |= nx.descendants(needs, root)
    part = needs.subgraph(reach)
    try:
        return list(reversed(list(nx.lexicographical_topological_sort(part))))
    except nx.NetworkXUnfeasible as error:
        cycle = [str(part.nodes[a]["ref"]) for a, _ in nx.find_cycle(part)]
        raise GateError(f"artifacts require each other: {' -> '.join([*cycle, cycle[0]])}", ref=cycle[0]) from error


def reachable(dag: nx.DiGraph[str], roots: Iterable[str]) -> set[str]:
    """All nodes that the roots point at by any relation, roots included: what a collector must keep."""
    reached = set(roots)
    for root in list(reached):
        reached |= nx.descendants(dag, root)
    return reached


def ancestry(dag: nx.DiGraph[str], digest: str) -> list[str]:
    """Nodes that an artifact comes from (relation ``parent``), nearest first."""
    parents = nx.subgraph_view(dag, filter_edge=lambda a, b: dag.edges[a, b]["relation"] == PARENT)
    return [node for _, node in nx.bfs_edges(parents, digest)]
