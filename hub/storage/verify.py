"""Is every byte of a store what it was? Nothing is trusted: not sizes, not the index, not the log's own claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub.errors import HubError, IntegrityError, NotFound
from hub.io import canonical_json as canonical
from hub.ref import AdapterRef

if TYPE_CHECKING:
    from hub.contents.tensor_files import FileScan
    from hub.manifest import FileEntry, Manifest
    from hub.storage.vault import Vault

    Seen = dict[tuple[str, int, str], FileScan | None]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong in a store: what it is about and one sentence."""

    about: str
    message: str

    def __str__(self) -> str:
        return f"{self.about}: {self.message}"


def verify_release(vault: Vault, ref: AdapterRef, digest: str, *, seen: Seen | None = None) -> list[Problem]:
    """Check one artifact: its manifest, every file, its tensors against the manifest, its OCI manifest.

    Parameters
    ----------
    vault
        Where it is.
    ref, digest
        What the log says was published.
    seen
        Files already checked, shared between artifacts; added to.
    """
    from hub.contents.checks import check_agreement
    from hub.storage.oci import image_manifest

    try:
        manifest = vault.manifest(digest)
        if manifest.ref != ref or manifest.digest != digest:
            raise IntegrityError(f"its manifest is that of {manifest.ref} ({manifest.digest})", ref=ref)
        vault.blobs.read(canonical.digest(image_manifest(manifest.canonical)))
    except HubError as error:
        return [Problem(str(ref), error.message)]
    problems, scans = [], {}
    for entry in manifest.files:
        try:
            scan = _scan(vault, manifest, entry, {} if seen is None else seen)
        except HubError as error:
            problems.append(Problem(str(ref), error.message))
            continue
        if scan is not None:
            scans[entry.path] = scan
    if not problems:
        try:
            check_agreement(manifest, scans)
        except HubError as error:
            problems.append(Problem(str(ref), error.message))
    return problems


def _scan(vault: Vault, manifest: Manifest, entry: FileEntry, seen: Seen) -> FileScan | None:
    from hub.contents.checks import inspect_as

    key = (entry.digest, entry.size, entry.path)
    if key not in seen:
        if not vault.blobs.path(entry.digest).exists():
            raise NotFound(f"{entry.path} is missing (blob {entry.digest})", digest=entry.digest)
        seen[key] = inspect_as(manifest, entry, vault.blobs.path(entry.digest))
    return seen[key]


def verify_store(vault: Vault, listed: Callable[[], set[str]]) -> list[Problem]:
    """Check the log's chain, every published artifact, and that an index has `listed` just those."""
    problems, published, live = list[Problem](), set[str](), dict[str, AdapterRef]()
    seen: Seen = {}
    try:
        for event, _ in vault.ledger.read():
            if event.op == "publish":
                published.add(str(event.digest))
                live[str(event.digest)] = AdapterRef.parse(event.name).at(version=event.version)
            elif event.op in ("delete", "evict"):
                live.pop(str(event.digest), None)
            elif event.digest is not None and event.digest not in published:
                problems.append(Problem(event.name, f"the log has {event.op} of {event.digest}, never published"))
    except HubError as error:
        problems.append(Problem("log.jsonl", error.message))
        return problems
    for digest, ref in live.items():
        problems += verify_release(vault, ref, digest, seen=seen)
    try:
        indexed = listed()
    except HubError as error:
        return [*problems, Problem("index", error.message)]
    if indexed != live.keys():
        problems.append(Problem("index", f"lists {len(indexed)} artifacts, the log {len(live)}"))
    return problems
