"""What a store does not need any more, and how it goes: first a plan, then the removal of what the plan says.

A blob is needed while a release in the log names it. With `superseded`, releases go as well that nothing leads to: no
alias, no lock file, no newest version of a name, and no requirement or parent of what stays. They are evicted, not
deleted: the very same digest may be pulled again.

Anyone may publish meanwhile. Blobs younger than the grace are left alone, whoever publishes makes those that it relies
on young again, and looks under the store's lock, which a removal holds, whether they are all still there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub.contents.manifest_outline import outline
from hub.errors import NotFound
from hub.io import canonical_json as canonical
from hub.io.disk import disk_errors
from hub.project.lock import Roots
from hub.ref import AdapterRef
from hub.relations.lineage import graph, reachable
from hub.storage.ledger import Position
from hub.storage.oci import image_manifest
from hub.storage.releases import choose

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact
    from hub.store import Store

GRACE = 3600.0  # seconds that a blob may wait for the release that names it


@dataclass(frozen=True, slots=True)
class Plan:
    """What would go: releases to be evicted, blobs that nothing names then, and their bytes."""

    releases: tuple[Artifact, ...]
    blobs: tuple[str, ...]
    size: int
    at: Position


def plan(store: Store, *, superseded: bool = False, grace: float = GRACE) -> Plan:
    """Look what a collection would remove; nothing is changed.

    Parameters
    ----------
    store
        The store.
    superseded
        Take releases too that nothing leads to.
    grace
        Seconds; younger blobs are left alone.

    Raises
    ------
    ManifestError
        A lock file that the store knows of cannot be read.
    """
    at = store.ledger.end()
    old = _superseded(store) if superseded else ()
    going = {artifact.digest for artifact in old}
    live = [artifact.digest for artifact in store.list(yanked=True) if artifact.digest not in going]
    needed = _named(store, live)
    youngest = time.time() - grace
    blobs, size = [], 0
    for digest in store.blobs:
        if digest not in needed:
            try:
                stat = store.blobs.path(digest).stat()
            except FileNotFoundError:  # another collector
                continue
            if stat.st_mtime < youngest:
                blobs.append(digest)
                size += stat.st_size
    return Plan(tuple(old), tuple(sorted(blobs)), size, at)


def collect(store: Store, wanted: Plan, *, grace: float = GRACE) -> int:
    """Remove what a plan says, but for what somebody has come to need since; returns the bytes freed."""
    if not store.exists:
        return 0
    freed = 0
    with disk_errors(store.root), store.lock():
        store.staging.sweep()
        needed = _named(store, _kept(store, wanted))
        youngest = time.time() - grace
        for digest in wanted.blobs:
            path = store.blobs.path(digest)
            if digest in needed or not path.exists() or path.stat().st_mtime >= youngest:
                continue
            freed += path.stat().st_size
            path.unlink()
    return freed


def _kept(store: Store, wanted: Plan) -> list[str]:
    """Evict what the plan says and is still superseded; returns the releases that the plan does not know as live."""
    going = {artifact.digest: artifact for artifact in wanted.releases}
    if going and store.ledger.end() != wanted.at:  # the world has changed since the plan was made
        still = {artifact.digest for artifact in _superseded(store)}
        going = {digest: artifact for digest, artifact in going.items() if digest in still}
    for artifact in going.values():
        store.bury(artifact.ref.at(digest=artifact.digest), "made room", final=False)
    since = [str(event.digest) for event, _ in store.ledger.read(wanted.at) if event.op == "publish"]
    return [artifact.digest for artifact in wanted.releases if artifact.digest not in going] + since


def _named(store: Store, digests: Iterable[str]) -> set[str]:
    """All blobs of releases: manifest, image manifest, files."""
    named = set[str]()
    for digest in digests:
        try:
            module = store.blobs.read(digest)
        except NotFound:  # deleted since, and collected
            continue
        named |= {digest, canonical.digest(image_manifest(module))}
        named.update(f"sha256:{entry['sha256']}" for entry in outline(module).get("files", ()))
    return named


def _superseded(store: Store) -> tuple[Artifact, ...]:
    """Releases that no root leads to: aliases, lock files, the newest version of each name."""
    everything = store.list(yanked=True)
    known, roots = graph(store), Roots(store).digests()
    for name in store.names():
        catalogue = store.catalogue(name)
        roots.update(catalogue.aliases.values())
        try:
            roots.add(choose(AdapterRef.parse(name), catalogue).digest)
        except NotFound:  # all its versions are yanked
            continue
    needed = reachable(known, [root for root in roots if root in known])
    return tuple(artifact for artifact in everything if artifact.digest not in needed)
