"""``modules.lock``: what a project needs, pinned by manifest digest, and the base each was made for.

What is needed stands in ``modules.yaml`` (or ``modules.toml``), as refs with ranges::

    requires: ["acme/tone>=1,<2", "acme/style@prod"]
    from: s3://bucket/adapters

The lock maps each of these refs, and each requirement of what they lead to, to a digest. No solver: the highest version
that fits is taken, and two versions of one name may stand side by side, since a digest names each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hub.errors import HubError, IntegrityError, ManifestError, NotFound, UsageError
from hub.io import canonical_json as canonical
from hub.io.files import atomic_write, read_capped
from hub.io.parallel import JOBS
from hub.manifest import Digest, Name, Record, RefText, VersionText, validate
from hub.ref import AdapterRef
from hub.remotes import from_url
from hub.storage.releases import Release
from hub.transfer import fetch_manifest, find, pull, requirement_ref

if TYPE_CHECKING:
    from hub.console.progress import Progress
    from hub.manifest import Manifest
    from hub.remotes import Remote
    from hub.storage.artifact import Artifact
    from hub.store import Store

LOCK_NAME = "modules.lock"
WISHES = ("modules.yaml", "modules.toml")
_MAX = 2**20  # bytes of a file of wishes


class Pin(Record):
    """One artifact of a lock: digest, the fingerprint of its base's weights, where it is, and what it needs.

    A ``source`` that begins with ``./`` or ``../`` starts from the directory of the lock, wherever that is checked out.
    """

    name: Name
    version: VersionText
    digest: Digest
    base: Digest | None = None
    source: str | None = None
    requires: dict[RefText, Digest] = Field(default_factory=dict)

    @property
    def ref(self) -> AdapterRef:
        """``ns/name@sha256:...``."""
        return AdapterRef.parse(self.name).at(digest=self.digest)


class Lock(Record):
    """What was asked for (ref -> digest), and all that it leads to, by name and version."""

    lock_version: Literal[1] = 1
    requires: dict[RefText, Digest] = Field(default_factory=dict)
    modules: Annotated[tuple[Pin, ...], Field(max_length=100_000)] = ()

    def pin(self, digest: str) -> Pin | None:
        """Pin of a digest, or None."""
        return next((pin for pin in self.modules if pin.digest == digest), None)

    def decided(self) -> dict[str, str]:
        """All decisions: ref -> digest."""
        versions = dict(self.requires)
        for pin in self.modules:
            versions.update(pin.requires)
        return versions

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; sorted, one fact a line, so that version control shows what changed."""
        data = {"lock_version": self.lock_version, **self.as_dict()}
        atomic_write(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Lock:
        """Read a lock. Raises NotFound, ManifestError."""
        if not path.exists():
            raise NotFound(f"there is no {path}", path=path, hint="`hub lock` makes it")
        try:
            lock = validate(cls, canonical.loads(read_capped(path, canonical.MAX_JSON), what=str(path)), what=str(path))
            lost = sorted(ref for ref, digest in lock.decided().items() if lock.pin(digest) is None)
            if lost:
                raise ManifestError(f"{path} does not say what {lost[0]} is", path=path)
        except ManifestError as error:
            raise ManifestError(error.message, path=path, hint="`hub lock --upgrade` makes it anew") from error
        return lock


def read_wishes(directory: Path) -> tuple[list[str], str | None] | None:
    """Refs and default remote of ``modules.yaml`` or ``modules.toml``; None where there is neither.

    Raises
    ------
    UsageError
        The file is not a list of refs under ``requires`` and, if that, a text under ``from``.
    """
    path = next((directory / name for name in WISHES if (directory / name).exists()), None)
    if path is None:
        return None
    document = _parse(path)
    refs, source = document.get("requires"), document.get("from")
    odd = set(document) - {"requires", "from"}
    if not isinstance(refs, list) or not refs or odd or not (source is None or isinstance(source, str)):
        raise UsageError(f"{path} is not a list of refs under `requires`, and a remote under `from`")
    return [str(AdapterRef.parse(str(ref))) for ref in refs], source


def _parse(path: Path) -> Mapping[str, Any]:
    data = read_capped(path, _MAX)
    try:
        document: object = _toml(data.decode()) if path.suffix == ".toml" else _yaml(data)
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a mapping with `requires`")
    return document


def _toml(text: str) -> object:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise UsageError("modules.toml needs Python 3.11", hint="write modules.yaml instead") from error
    return tomllib.loads(text)


def _yaml(data: bytes) -> object:
    import yaml

    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def beside(source: str, directory: Path) -> str:
    """The place that a relative path leads to from a directory; any other place as it is."""
    return str(directory / source) if source.startswith(("./", "../")) else source


def as_written(source: str | None, directory: Path) -> str | None:
    """A relative path as a lock keeps it: from the directory of the lock. None for any other place."""
    if source is None or "://" in source or not (path := Path(source)).parts or path.is_absolute():
        return None
    relative = Path(os.path.relpath(path, directory)).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


class Resolver:
    """From refs to a lock.

    Parameters
    ----------
    store, remote
        Where to look: at the remote first, where there is one.
    locked
        A lock whose decisions stay as they are.
    source
        What the lock calls the remote, where that is not its URL.
    """

    def __init__(
        self, store: Store, remote: Remote | None, locked: Lock | None = None, source: str | None = None
    ) -> None:
        self.store, self.remote, self.source = store, remote, source
        self.locked = locked or Lock()
        self._decided = self.locked.decided()
        self._pins: dict[str, Pin] = {}

    def lock(self, refs: list[str]) -> Lock:
        """Resolve refs and all that they lead to. Raises NotFound, saying what there is instead."""
        wanted = {ref: self._digest(AdapterRef.parse(ref)) for ref in refs}
        pins = sorted(self._pins.values(), key=lambda pin: (pin.name, pin.version, pin.digest))
        return Lock(requires=wanted, modules=tuple(pins))

    def _digest(self, ref: AdapterRef) -> str:
        pin = self.locked.pin(self._decided.get(str(ref), ""))
        if pin is not None:
            self._keep(pin)
            return pin.digest
        release, at = self._find(ref)
        if release.digest not in self._pins:
            manifest = self.store.manifest(release.digest) if at is None else fetch_manifest(at, ref, release)
            self._add(manifest, at)
        return release.digest

    def _find(self, ref: AdapterRef) -> tuple[Release, Remote | None]:
        if self.remote is not None:
            try:
                return find(self.remote, ref), self.remote
            except NotFound:
                if not self.store.catalogue(ref.id).releases:
                    raise
        return self.store.resolve(ref), None

    def _keep(self, pin: Pin) -> None:
        if pin.digest not in self._pins:
            self._pins[pin.digest] = pin
            for digest in pin.requires.values():
                if (needed := self.locked.pin(digest)) is not None:
                    self._keep(needed)

    def _add(self, manifest: Manifest, at: Remote | None) -> None:
        pin = Pin(
            name=manifest.name,
            version=manifest.version,
            digest=manifest.digest,
            base=manifest.base.weights_fingerprint if manifest.base else None,
            source=(self.source or at.url) if at else None,
        )
        self._pins[pin.digest] = pin  # before its requirements, so that a cycle ends
        refs = [requirement_ref(need) for need in manifest.requires]
        needs = {str(ref): self._digest(ref) for ref in refs}
        self._pins[pin.digest] = pin.model_copy(update={"requires": needs})


def sync(
    lock: Lock,
    store: Store,
    remote: Remote | None,
    progress: Progress,
    *,
    jobs: int = JOBS,
    directory: Path = Path(),
) -> Iterator[tuple[Artifact, bool]]:
    """Bring exactly what a lock says into the store; each artifact, and whether it had to be fetched.

    Parameters
    ----------
    directory
        Of the lock, where its relative sources start.

    Raises
    ------
    NotFound
        What is locked is nowhere to be had.
    IntegrityError
        The lock says another version or another base of a digest than its manifest: it was edited.
    """
    opened: dict[str, Remote] = {}
    for pin in lock.modules:
        here = store.catalogue(pin.name).find(digest=pin.digest) is not None and _whole(store, pin.digest)
        if not here:
            if remote is None and pin.source is None:
                raise NotFound(
                    f"{pin.name}@{pin.version} was locked from a store and is not in {store.where}",
                    ref=pin.ref,
                    digest=pin.digest,
                    hint="name a remote that has it: hub sync --from REMOTE",
                )
            if remote is None and pin.source not in opened:
                opened[str(pin.source)] = from_url(beside(str(pin.source), directory))
            place = remote or opened[str(pin.source)]
            pull(store, place, pin.ref, progress=progress, requires=False, jobs=jobs)
        artifact = store.get(pin.ref)
        base = artifact.manifest.base.weights_fingerprint if artifact.manifest.base else None
        if (artifact.ref.version, base) != (pin.version, pin.base):
            raise IntegrityError(
                f"the lock calls {artifact.ref} {pin.name}@{pin.version}, or names another base",
                ref=artifact.ref,
                digest=pin.digest,
                hint="`hub lock --upgrade` makes it anew",
            )
        yield artifact, not here


def _whole(store: Store, digest: str) -> bool:
    try:
        return all(store.blobs.has(entry.digest, entry.size) for entry in store.manifest(digest).files)
    except HubError:  # damaged or collected: it is fetched again
        return False


class Roots:
    """Lock files that were made or used with a store: what they pin is kept by its collector."""

    def __init__(self, store: Store) -> None:
        self.path = store.root / "locks.json"

    def paths(self) -> list[Path]:
        """Lock files that are still there."""
        if not self.path.exists():
            return []
        known = canonical.loads(read_capped(self.path, _MAX), what=str(self.path))
        if not isinstance(known, list) or not all(isinstance(text, str) for text in known):
            raise ManifestError(
                f"{self.path} is not a list of paths", path=self.path, hint="remove it, then `hub sync`"
            )
        return [path for path in map(Path, known) if path.exists()]

    def add(self, store: Store, lock: Path) -> None:
        """Remember a lock file."""
        with store.lock():
            known = self.paths()
            if lock.absolute() not in known:
                atomic_write(self.path, json.dumps(sorted(map(str, [*known, lock.absolute()]))).encode())

    def digests(self) -> set[str]:
        """All that is pinned. Raises ManifestError for a lock that cannot be read: what it needs is unknown."""
        return {pin.digest for path in self.paths() for pin in Lock.load(path).modules}
