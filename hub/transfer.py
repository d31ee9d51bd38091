"""Push and pull between a store and a remote: the digest difference only, blobs first, the manifest last.

Several blobs move at once. What was interrupted goes on where it stopped: whole blobs are not sent again, and of a
partial one the bytes that are there already are kept. The receiving side checks every byte before it gets its name.
Signatures travel behind, and are checked by nobody before `hub verify --key`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hub.console.progress import Progress, quiet
from hub.errors import GateError, IntegrityError, NotFound, suggest
from hub.io import canonical_json as canonical
from hub.io.parallel import JOBS, Workers
from hub.ref import LATEST, AdapterRef, version_key
from hub.storage.releases import Catalogue, Release, choose, refuse_conflict
from hub.storage.signatures import fitting

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest, Requirement
    from hub.remotes.base import Remote
    from hub.store import Artifact, Store


@dataclass(frozen=True)
class _Move:
    """What stays the same while an artifact and its requirements move."""

    store: Store
    remote: Remote
    progress: Progress
    requires: bool
    workers: Workers


def push(
    store: Store,
    remote: Remote,
    ref: str | AdapterRef,
    *,
    progress: Progress = quiet,
    requires: bool = True,
    jobs: int = JOBS,
) -> Artifact:
    """Send an artifact to a remote, its requirements before it. An alias in the ref moves there too.

    Parameters
    ----------
    store, remote
        From where, to where.
    ref
        What to send.
    progress
        Told of the bytes.
    requires
        Whether the artifacts it requires are sent as well, where the remote lacks them.
    jobs
        Blobs that move at once, at most.

    Returns
    -------
    Artifact
        The one sent.

    Raises
    ------
    Conflict
        The remote has this version with other content.
    """
    return _push(_Move(store, remote, progress, requires, Workers(jobs)), AdapterRef.parse(ref), ())


def _push(move: _Move, ref: AdapterRef, above: tuple[str, ...]) -> Artifact:
    remote, artifact = move.remote, move.store.get(ref)
    manifest = artifact.manifest
    _refuse_cycle(ref, artifact.digest, above)
    refuse_conflict(artifact.ref, artifact.digest, remote.catalogue(ref.id), where=remote.url)
    for need in manifest.requires if move.requires else ():
        if _release_for(need, remote.catalogue(need.name)) is None:
            _push(move, requirement_ref(need), (*above, artifact.digest))
    missing = remote.missing(manifest)
    advance = move.workers.watched(move.progress(f"push {artifact.ref}", sum(entry.size for entry in missing)))

    def send(entry: FileEntry) -> None:
        source = artifact.blob(entry.path) if remote.checks_uploads else artifact.file(entry.path)
        remote.write(manifest, entry, source, advance)

    move.workers.map(send, missing)
    remote.publish(manifest)
    if mine := move.store.signatures.of(artifact.digest):
        there = fitting(remote.signatures(ref.id, artifact.digest))
        if mine.keys() - there.keys():
            remote.sign(ref.id, artifact.digest, {**mine, **there})
    if ref.alias and ref.alias != LATEST:
        remote.tag(ref.id, ref.alias, artifact.digest)
    return artifact


def pull(
    store: Store,
    remote: Remote,
    ref: str | AdapterRef,
    *,
    progress: Progress = quiet,
    requires: bool = True,
    jobs: int = JOBS,
) -> Artifact:
    """Bring an artifact from a remote into the store, its requirements before it; every byte is checked.

    An alias in the ref is set here too. Parameters as in `push`.

    Raises
    ------
    NotFound
        The remote has nothing that fits, with did-you-mean.
    IntegrityError, GateError, ManifestError
        What the remote sent is not what was published, or must not be admitted; nothing is published here then.
    """
    return _pull(_Move(store, remote, progress, requires, Workers(jobs)), AdapterRef.parse(ref), ())


def _pull(move: _Move, ref: AdapterRef, above: tuple[str, ...]) -> Artifact:
    store, remote, workers = move.store, move.remote, move.workers
    release = find(remote, ref)
    _refuse_cycle(ref, release.digest, above)
    manifest = fetch_manifest(remote, ref, release)
    for need in manifest.requires if move.requires else ():
        if _release_for(need, store.catalogue(need.name)) is None:
            _pull(move, requirement_ref(need), (*above, release.digest))
    wanted = [entry for entry in manifest.files if not store.blobs.has(entry.digest, entry.size)]
    advance = workers.watched(move.progress(f"pull {manifest.ref}", sum(entry.size for entry in wanted)))

    def fetch(entry: FileEntry, part: Path) -> None:
        store.staging.complete(entry, part, lambda start: workers.chunks(remote.read(manifest, entry, start)), advance)

    store.ingest(manifest, fetch, reuse=True, workers=workers)
    for key, data in fitting(remote.signatures(ref.id, release.digest)).items():
        store.signatures.add(release.digest, key, data)
    if ref.alias and ref.alias != LATEST:
        store.tag(manifest.ref, ref.alias)
    return store.get(manifest.ref)


def find(remote: Remote, ref: AdapterRef) -> Release:
    """Pick the release of a remote that a ref stands for. Raises NotFound with did-you-mean."""
    catalogue = remote.catalogue(ref.id)
    if not catalogue.releases:
        hint = _instead(ref.id, remote.names(), remote.url)
        raise NotFound(f"there is no adapter {ref.id} in {remote.url}", ref=ref, hint=hint)
    return choose(ref, catalogue, where=remote.url)


def _instead(name: str, known: Sequence[str], url: str) -> str:
    """Next step where a remote has no such name."""
    if not known:
        return f"nothing is to be seen there; `hub push {name} --to {url}` sends it, from a store that has it"
    more = ", ..." if len(known) > 5 else ""
    return suggest(name, known) or f"it has {', '.join(known[:5])}{more}"


def fetch_manifest(remote: Remote, ref: AdapterRef, release: Release) -> Manifest:
    """Read a manifest from a remote: it must have the digest, and be of the name and version, that were asked for."""
    from hub.manifest import Manifest

    data = remote.manifest(ref.id, release.digest)
    if canonical.digest(data) != release.digest:
        raise IntegrityError(
            f"{remote.url} sent a manifest of {ref.id} with the digest {canonical.digest(data)[:19]}..., "
            f"not {release.digest[:19]}...",
            ref=ref,
            digest=release.digest,
        )
    manifest = Manifest.parse(data, what=f"the manifest of {ref.id} in {remote.url}")
    expected = ref.at(version=release.version)
    if manifest.ref != expected or manifest.digest != release.digest:
        raise IntegrityError(
            f"{remote.url} has {manifest.ref} under the name {expected}", ref=ref, digest=release.digest
        )
    return manifest


def last_manifest(store: Store, remote: Remote | None, name: str, catalogues: Sequence[Catalogue]) -> Manifest | None:
    """Manifest of the highest version of a name, in the store or at the remote; None where there is none.

    `catalogues` are those of the store and, where there is one, of the remote.
    """
    releases = [release for catalogue in catalogues for release in catalogue.releases]
    if not releases:
        return None
    last = max(releases, key=lambda release: version_key(release.version))
    if remote is None or catalogues[0].find(digest=last.digest) is not None:
        return store.manifest(last.digest)
    return fetch_manifest(remote, AdapterRef.parse(name), last)


def requirement_ref(need: Requirement) -> AdapterRef:
    """Ref of a requirement: by digest where it has one, else by range."""
    name = AdapterRef.parse(need.name)
    if need.digest:
        return name.at(digest=need.digest)
    return AdapterRef(name.namespace, name.name, range=need.range)


def _refuse_cycle(ref: AdapterRef, digest: str, above: tuple[str, ...]) -> None:
    if digest in above:
        raise GateError(f"{ref} requires itself", ref=ref, digest=digest, hint="publish a version without the cycle")


def _release_for(need: Requirement, catalogue: Catalogue) -> Release | None:
    try:
        return choose(requirement_ref(need), catalogue)
    except NotFound:
        return None
