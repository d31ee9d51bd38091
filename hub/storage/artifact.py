"""One published artifact in a store: its ref, its manifest and its files."""

from __future__ import annotations

import shutil
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hub.errors import Conflict, IntegrityError, NotFound, suggest
from hub.io import canonical_json as canonical
from hub.io.files import CHUNK, atomic_write, fsync_directory, open_regular
from hub.ref import AdapterRef
from hub.storage.blobs import Blobs
from hub.storage.index import Facts

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

# Blobs this process has hashed already: (path, inode, size, mtime in ns). A changed file is hashed again.
_checked: set[tuple[str, int, int, int]] = set()


class Artifact:
    """An artifact in a store; cheap to hold, its manifest is read when it is first asked for.

    Attributes
    ----------
    ref
        ``ns/name@version``.
    digest
        Of the manifest: the artifact's identity.
    facts
        What the index knows of it.
    """

    def __init__(self, facts: Facts, blobs: Blobs) -> None:
        self.facts = facts
        self.ref = AdapterRef.parse(facts.name).at(version=facts.version)
        self.digest = facts.digest
        self._blobs = blobs

    def __repr__(self) -> str:
        return f"Artifact({str(self.ref)!r}, {self.digest!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Artifact) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, checked against the digest."""
        from hub.manifest import Manifest

        return Manifest.parse(self._blobs.read(self.digest), what=f"manifest of {self.ref}")

    @property
    def files(self) -> tuple[str, ...]:
        """Relative paths of all files, sorted."""
        return tuple(entry.path for entry in self.manifest.files)

    def file(self, name: str) -> Path:
        """Path of the blob that holds a file; every byte is checked, once a process.

        Raises
        ------
        NotFound
            No file of that name, with did-you-mean.
        IntegrityError
            The blob is missing, truncated or damaged.
        """
        entry, path = self._entry(name), self.blob(name)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise self._damage(entry, "is missing") from None
        seen = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen not in _checked:
            if problem := self._blobs.check(entry.digest, entry.size):
                raise self._damage(entry, problem)
            _checked.add(seen)
        return path

    def blob(self, name: str) -> Path:
        """Path of the blob that holds a file, unchecked: for whoever hashes it while reading."""
        return self._blobs.path(self._entry(name).digest)

    def read(self, name: str) -> bytes:
        """All bytes of a small file (at most `canonical.MAX_JSON`), checked."""
        return self._blobs.read(self._entry(name).digest, canonical.MAX_JSON)

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.file(name)
        if entry is None:
            hint = suggest(name, self.files) or f"it has {', '.join(self.files)}"
            raise NotFound(f"{self.ref} has no file {name!r}", ref=self.ref, path=name, hint=hint)
        return entry

    def _damage(self, entry: FileEntry, problem: str) -> IntegrityError:
        return IntegrityError(
            f"{self.ref}: {entry.path} {problem}",
            ref=self.ref,
            digest=entry.digest,
            path=self._blobs.path(entry.digest),
            hint=f"pull or push it again to mend the store; `hub verify {self.ref}` lists all damage",
        )

    def materialize(self, directory: Path) -> Path:
        """Write the artifact as a plain directory, whole or not at all.

        Parameters
        ----------
        directory
            Must not exist, be empty, or hold this very artifact already (then nothing is done).

        Returns
        -------
        Path
            The directory.

        Raises
        ------
        Conflict
            The directory holds something else.
        IntegrityError
            A blob is damaged; the directory is then as it was.
        """
        directory = Path(directory)
        if self._stands(directory):
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        young = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            young.mkdir()
            for entry in self.manifest.files:
                target = young / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._copy(entry, target)
            atomic_write(young / "module.json", self.manifest.canonical)
            young.replace(directory)
        except BaseException:
            shutil.rmtree(young, ignore_errors=True)
            raise
        fsync_directory(directory.parent)
        return directory

    def _copy(self, entry: FileEntry, target: Path) -> None:
        import hashlib

        hasher, size = hashlib.sha256(), 0
        try:
            source = open_regular(self._blobs.path(entry.digest))
        except NotFound:
            raise self._damage(entry, "is missing") from None
        with source, target.open("xb") as file:
            while chunk := source.read(CHUNK):
                hasher.update(chunk)
                size += file.write(chunk)
        if size != entry.size or hasher.hexdigest() != entry.sha256:
            raise self._damage(entry, f"is damaged: {size} bytes, sha256 {hasher.hexdigest()[:16]}...")

    def _stands(self, directory: Path) -> bool:
        """Whether the directory holds this artifact unchanged; Conflict when it holds anything else."""
        from hub.contents.checks import IGNORED
        from hub.errors import HubError
        from hub.io.files import sha256_file, walk
        from hub.manifest import read_manifest

        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return False
        problem = "holds other files"
        try:
            if directory.is_dir() and read_manifest(directory).digest == self.digest:
                listed = {entry.path: (entry.sha256, entry.size) for entry in self.manifest.files}
                present = set(walk(directory, ignore=IGNORED)) - {"module.json"}
                if present == listed.keys() and all(sha256_file(directory / p) == listed[p] for p in listed):
                    return True
                problem = f"holds {self.ref}, but changed"
        except HubError:
            pass
        raise Conflict(f"{directory} {problem}", path=directory, hint="give another directory, or remove it first")
