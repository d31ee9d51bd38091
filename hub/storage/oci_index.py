"""``index.json`` of a store: the OCI face of its log, brought up to it after every entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hub.io import canonical_json as canonical
from hub.io.files import atomic_write, read_capped
from hub.ref import name_key
from hub.storage import oci
from hub.storage.blobs import Blobs
from hub.storage.ledger import Event, Ledger, Position
from hub.storage.releases import Catalogue

EAGER = 2000  # descriptors; beyond, index.json is rewritten only by `Store.rebuild_index`, as that is O(n)


Images = Mapping[str, tuple[str, int]]
"""Manifest digest -> digest and size of its image manifest."""


def refresh(
    root: Path,
    ledger: Ledger,
    blobs: Blobs,
    at: Position,
    changed: Catalogue | None = None,
    images: Images | None = None,
) -> None:
    """Bring ``index.json`` up to the log.

    Parameters
    ----------
    root, ledger, blobs
        Of the store.
    at
        The end of the log.
    changed
        The one name that the log's last entry is about, as it is now: where ``index.json`` is current but for it,
        only its entries are written anew. Without it, all are.
    images
        Those that the caller knows already; others are made from the manifests.
    """
    images = images or {}
    path = root / "index.json"
    entries = None
    if changed is not None and path.exists():
        # A rewrite costs as much as the file is long, and a large store would pay it with every push.
        if path.stat().st_size > EAGER * 400:
            return
        # None unless it stands exactly one entry behind: a process that died may have left it further back.
        entries = oci.read_index(read_capped(path, 2**30), seq=at.seq - 1)
    if entries is None or changed is None:
        entries = [entry for catalogue in _catalogues(ledger) for entry in _descriptors(blobs, catalogue, images)]
    else:
        entries = [entry for entry in entries if not oci.of_name(entry, changed.name)]
        entries += _descriptors(blobs, changed, images)
    atomic_write(path, oci.write_index(entries, seq=at.seq))


def _catalogues(ledger: Ledger) -> Iterator[Catalogue]:
    """All names, from one pass over the log."""
    events: dict[str, list[Event]] = {}
    for event, _ in ledger.read():
        events.setdefault(name_key(event.name), []).append(event)
    return (Catalogue.fold(name, of_name) for name, of_name in events.items())


def _descriptors(blobs: Blobs, catalogue: Catalogue, images: Images) -> list[dict[str, object]]:
    descriptors = []
    for release in catalogue.releases:
        image = images.get(release.digest) or _image(blobs, release.digest)
        tags = (release.version, *catalogue.aliases_of(release.digest))
        descriptors += [oci.descriptor(catalogue.name, tag, *image) for tag in tags]
    return descriptors


def _image(blobs: Blobs, digest: str) -> tuple[str, int]:
    image = oci.image_manifest(blobs.read(digest))
    return canonical.digest(image), len(image)
