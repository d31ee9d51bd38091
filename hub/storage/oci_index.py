"""``index.json`` of a store: the OCI face of its log, brought up to it after every entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hub.io import canonical_json as canonical
from hub.io.files import atomic_write, read_capped
from hub.storage import oci
from hub.storage.ledger import Event, Position
from hub.storage.releases import Catalogue

if TYPE_CHECKING:
    from hub.storage.vault import Vault

EAGER = 2000  # descriptors; beyond, index.json is rewritten only by `Store.rebuild_index`, as that is O(n)


Images = Mapping[str, tuple[str, int]]
"""Manifest digest -> digest and size of its image manifest."""


def refresh(vault: Vault, name: str | None, at: Position, images: Images | None = None) -> None:
    """Bring ``index.json`` up to the log: one name's entries when it is current but for them, else all.

    `images` are those that the caller knows already.
    """
    images = images or {}
    path = vault.root / "index.json"
    entries = None
    if name is not None and path.exists():
        if path.stat().st_size > EAGER * 400:
            return
        entries = oci.read_index(read_capped(path, 2**30), seq=at.seq - 1)
    if entries is None or name is None:
        entries = [entry for catalogue in _catalogues(vault) for entry in _descriptors(vault, catalogue, images)]
    else:
        entries = [entry for entry in entries if not oci.of_name(entry, name)]
        entries += _descriptors(vault, vault.catalogue(name), images)
    atomic_write(path, oci.write_index(entries, seq=at.seq))


def _catalogues(vault: Vault) -> Iterator[Catalogue]:
    """All names, from one pass over the log."""
    events: dict[str, list[Event]] = {}
    for event, _ in vault.ledger.read():
        events.setdefault(event.name, []).append(event)
    return (Catalogue.fold(name, found) for name, found in events.items())


def _descriptors(vault: Vault, catalogue: Catalogue, images: Images) -> list[dict[str, object]]:
    found = []
    for release in catalogue.releases:
        image = images.get(release.digest) or _image(vault, release.digest)
        tags = (release.version, *catalogue.aliases_of(release.digest))
        found += [oci.descriptor(catalogue.name, tag, *image) for tag in tags]
    return found


def _image(vault: Vault, digest: str) -> tuple[str, int]:
    image = oci.image_manifest(vault.blobs.read(digest))
    return canonical.digest(image), len(image)
