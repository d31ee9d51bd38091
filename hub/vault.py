"""Blobs plus the log, under one lock: a store before it has an index, and what a directory remote is.

Order of a publication: file blobs, manifest blob, then one line of the log. A kill at any instant leaves the old
state and perhaps some unreferenced blobs, or the new state.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hub.blobs import Blobs
from hub.errors import Conflict, HubError, IntegrityError, NotFound, StoreError, UsageError, suggest
from hub.ledger import Event, Ledger, Position
from hub.ref import LATEST, AdapterRef, check_alias
from hub.resolve import Catalogue, Release, choose, refuse_conflict
from hub.staging import AGAIN, Staging

if TYPE_CHECKING:
    from filelock import FileLock

    from hub.manifest import FileEntry, Manifest
    from hub.tensors import FileScan

ABSENT = "absent"  # the expectation that an alias does not exist yet
LOCK_TIMEOUT = 120.0  # seconds
EAGER_OCI_INDEX = 2000  # descriptors; beyond, index.json is rewritten only by `rebuild_index`, as that is O(n)

_one_lock_each = threading.Lock()  # a FileLock is reentrant only as one object

Fetch = Callable[["FileEntry", Path], None]

_DISK = {
    errno.ENOSPC: ("the disk is full", "free some space, or move the store with HUB_HOME"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or move the store with HUB_HOME"),
    errno.EFBIG: ("a file grew over the size limit", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "move the store with HUB_HOME"),
    errno.EACCES: ("there is no permission", "check the owner, or move the store with HUB_HOME"),
    errno.EPERM: ("there is no permission", "check the owner, or move the store with HUB_HOME"),
    errno.ENOTDIR: ("a part of the path is not a directory", "move the store with HUB_HOME"),
}


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn what the operating system says about the disk into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        known = _DISK.get(error.errno or 0)
        if known is None:
            raise
        where = error.filename or root
        raise StoreError(f"cannot use {where}: {known[0]}", path=str(where), hint=known[1]) from error
    except sqlite3.OperationalError as error:
        raise StoreError(
            f"the index of {root} cannot be used: {error}",
            path=root,
            hint="look at the free space and the permissions there, or move the store with HUB_HOME",
        ) from error


class Vault:
    """A directory of blobs and its log.

    Parameters
    ----------
    root
        The directory; made by the first write, never by a read.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.blobs = Blobs(self.root)
        self.staging = Staging(self.root)
        self.ledger = Ledger(self.root / "log.jsonl")
        self._lock: FileLock | None = None
        self._turn = threading.RLock()

    @property
    def exists(self) -> bool:
        """Whether anything was ever written here."""
        return self.ledger.path.exists() or (self.root / "oci-layout").exists()

    def create(self) -> None:
        """Make the layout where it is not there yet. Raises StoreError (no permission, read-only, full)."""
        from hub.files import atomic_write
        from hub.oci import LAYOUT

        with disk_errors(self.root):
            self.blobs.directory.mkdir(parents=True, exist_ok=True)
            if not (layout := self.root / "oci-layout").exists():
                atomic_write(layout, LAYOUT)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store's lock, across threads and processes; makes the layout first. It may be nested.

        Raises
        ------
        StoreError
            No permission, read-only, full, or locked by another process for `LOCK_TIMEOUT` seconds.
        """
        from filelock import FileLock, Timeout

        with _one_lock_each:
            if self._lock is None:
                self._lock = FileLock(self.root / ".lock", timeout=LOCK_TIMEOUT, poll_interval=0.01)
        locked = StoreError(
            f"{self.root} is locked by another process", path=self.root, hint="wait for it, then try again"
        )
        # Threads queue for their turn, so that only one of them polls the file: forty that poll leave no time to work.
        if not self._turn.acquire(timeout=LOCK_TIMEOUT):
            raise locked
        try:
            self.create()
            with disk_errors(self.root):
                try:
                    self._lock.acquire()
                except Timeout as error:
                    raise locked from error
                try:
                    yield
                finally:
                    self._lock.release()
        finally:
            self._turn.release()

    def catalogue(self, name: str) -> Catalogue:
        """Releases and aliases of ``ns/name``."""
        return Catalogue.fold(name, self.ledger.about(name))

    def names(self) -> list[str]:
        """All names with a release, sorted."""
        return sorted({event.name for event, _ in self.ledger.read() if event.op == "publish"})

    def resolve(self, ref: str | AdapterRef) -> Release:
        """Pick the release a ref stands for; NotFound with did-you-mean."""
        ref = AdapterRef.parse(ref)
        catalogue = self.catalogue(ref.id)
        if not catalogue.releases:
            names = self.names()
            same = [name for name in names if name.split("/")[1] == ref.name]
            hint = suggest(ref.id, names) or (f"did you mean {' or '.join(same[:3])}?" if same else None)
            raise NotFound(f"there is no adapter {ref.id} in {self.where}", ref=ref, hint=hint or self.absent_hint)
        return choose(ref, catalogue, where=self.where)

    @property
    def where(self) -> str:
        """How messages call this place."""
        return str(self.root)

    absent_hint = "`hub list` shows what there is"

    def manifest(self, digest: str) -> Manifest:
        """Read a manifest, checked against its digest."""
        from hub.manifest import Manifest

        return Manifest.parse(self.blobs.read(digest), what=f"manifest {digest}")

    def refuse_conflict(self, manifest: Manifest) -> bool:
        """Whether this very artifact is here already; Conflict when another one has its name and version."""
        return refuse_conflict(manifest.ref, manifest.digest, self.catalogue(manifest.name), where=self.where)

    def ingest(self, manifest: Manifest, fetch: Fetch, *, reuse: bool) -> bool:
        """Bring an artifact in: fetch its files, check every byte, publish.

        Parameters
        ----------
        manifest
            Of the artifact.
        fetch
            Called with a file entry and a path to write its bytes to.
        reuse
            Take blobs that are here already and whole instead of fetching them, and let `fetch` complete what an
            earlier try has left of one. Otherwise each file is fetched, since it is the source that is checked.

        Returns
        -------
        bool
            Whether it is new here.

        Raises
        ------
        IntegrityError, GateError
            Bytes that are not what the manifest says, or that must not be admitted; nothing is published then.
        """
        from hub.gates import check_agreement, check_file_set

        self.refuse_conflict(manifest)
        check_file_set((entry.path for entry in manifest.files), manifest)
        self.create()
        scans = {}
        with disk_errors(self.root), self.staging.room() as room:
            for entry in manifest.files:
                scan = self._admit(manifest, entry, fetch, room, reuse)
                if scan is not None:
                    scans[entry.path] = scan
            check_agreement(manifest, scans)
            return self.publish(manifest, room)

    def _admit(self, manifest: Manifest, entry: FileEntry, fetch: Fetch, room: Path, reuse: bool) -> FileScan | None:
        from hub.gates import REPACK, inspect_as

        if reuse and self.blobs.has(entry.digest, entry.size):
            # A blob that is damaged here is fetched again, which mends it.
            with suppress(IntegrityError):
                return inspect_as(manifest, entry, self.blobs.path(entry.digest))
        staged = self.staging.claim(entry.digest, room) if reuse else room / entry.sha256
        resumed = staged.exists()
        fetch(entry, staged)
        try:
            scan = inspect_as(manifest, entry, staged, hint=AGAIN if reuse else REPACK)
        except HubError:
            staged.unlink(missing_ok=True)  # whole and wrong: nothing to resume
            if resumed:  # what an earlier try has left may be what is wrong
                return self._admit(manifest, entry, fetch, room, reuse)
            raise
        self.blobs.adopt(staged, entry.digest)
        return scan

    def publish(self, manifest: Manifest, room: Path) -> bool:
        """Write the manifest and the log entry of an artifact whose file blobs are here."""
        from hub.oci import image_manifest

        self.refuse_conflict(manifest)
        for entry in manifest.files:
            if not self.blobs.has(entry.digest, entry.size):
                raise IntegrityError(
                    f"{manifest.ref}: the blob of {entry.path} is not in {self.where}", ref=manifest.ref
                )
        self.blobs.add(manifest.canonical, room)
        self.blobs.add(image_manifest(manifest.canonical), room)
        with self.lock():
            if self.refuse_conflict(manifest):
                return False
            self._commit(Event("publish", manifest.name, manifest.digest, version=manifest.version))
        return True

    def set_alias(self, ref: AdapterRef, alias: str, *, expect: str | None = None, remove: bool = False) -> str | None:
        """Move or remove an alias, by compare-and-swap where `expect` is given.

        Parameters
        ----------
        ref
            What the alias shall stand for (its name alone counts for a removal).
        alias
            The alias.
        expect
            Where the alias must stand now: a version, a digest or `ABSENT`; None moves it from anywhere.
        remove
            Take the alias away.

        Returns
        -------
        str or None
            The digest it stood for before.

        Raises
        ------
        Conflict
            It stands elsewhere; the message says where.
        """
        if check_alias(alias) == LATEST:
            raise UsageError(
                f"{LATEST!r} is computed: the highest version that is not yanked", hint="use another alias"
            )
        with self.lock():
            catalogue = self.catalogue(ref.id)
            target = None if remove else self.resolve(ref).digest
            before = catalogue.aliases.get(alias)
            if remove and before is None:
                known = suggest(alias, catalogue.aliases)
                raise NotFound(f"{ref.id} has no alias {alias!r}", ref=ref, hint=known)
            _compare(catalogue, alias, before, expect)
            if before != target:
                self._commit(Event("alias", ref.id, target, alias=alias))
        return before

    def yank(self, ref: AdapterRef, reason: str | None) -> Release:
        """Yank a release with a reason, or take that back (None). It stays readable by an exact pin."""
        with self.lock():
            release = self.resolve(ref)
            if release.yanked != reason:
                op, text = ("yank", reason) if reason is not None else ("unyank", None)
                self._commit(Event(op, ref.id, release.digest, version=release.version, reason=text))  # type: ignore[arg-type]
        return Release(release.version, release.digest, reason)

    def _commit(self, event: Event) -> None:
        at = self.ledger.append(event, self.ledger.end())
        self._appended()
        self.refresh_oci_index(event.name, at)

    def _appended(self) -> None:
        """Called under the lock when the log has grown; a store brings its index up to it."""

    def refresh_oci_index(self, name: str | None, at: Position) -> None:
        """Bring ``index.json`` up to the log: one name's entries when it is current but for them, else all."""
        from hub import oci
        from hub.files import atomic_write, read_capped

        path = self.root / "index.json"
        entries = None
        if name is not None and path.exists():
            if path.stat().st_size > EAGER_OCI_INDEX * 400:
                return
            entries = oci.read_index(read_capped(path, 2**30), seq=at.seq - 1)
        if entries is None or name is None:
            entries = [entry for catalogue in self._catalogues() for entry in self._descriptors(catalogue)]
        else:
            entries = [entry for entry in entries if not oci.of_name(entry, name)]
            entries += self._descriptors(self.catalogue(name))
        atomic_write(path, oci.write_index(entries, seq=at.seq))

    def _catalogues(self) -> Iterator[Catalogue]:
        """All names, from one pass over the log."""
        events: dict[str, list[Event]] = {}
        for event, _ in self.ledger.read():
            events.setdefault(event.name, []).append(event)
        return (Catalogue.fold(name, found) for name, found in events.items())

    def _descriptors(self, catalogue: Catalogue) -> list[dict[str, object]]:
        from hub import oci

        found = []
        for release in catalogue.releases:
            image = oci.image_manifest(self.blobs.read(release.digest))
            tags = (release.version, *catalogue.aliases_of(release.digest))
            found += [oci.descriptor(catalogue.name, tag, image) for tag in tags]
        return found


def _compare(catalogue: Catalogue, alias: str, before: str | None, expect: str | None) -> None:
    if expect is None:
        return
    if expect == ABSENT:
        wanted = None
    else:
        release = catalogue.find(digest=expect) if expect.startswith("sha256:") else catalogue.find(version=expect)
        wanted = release.digest if release else expect
    if before != wanted:
        now = catalogue.find(digest=before) if before else None
        raise Conflict(
            f"alias {alias!r} of {catalogue.name} stands at {now.version if now else 'nothing'}, not at {expect}",
            ref=f"{catalogue.name}@{alias}",
            digest=before,
            hint="someone moved it; look again, then decide",
        )
