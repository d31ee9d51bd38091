"""Blobs plus the log, under one lock: a store before it has an index, and what a directory remote is.

Order of a publication: file blobs, manifest blob, then one line of the log. A kill at any instant leaves the old
state and perhaps some unreferenced blobs, or the new state.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hub.contents.scan_while_writing import following
from hub.errors import HubError, IntegrityError, NotFound, StoreError, UsageError, suggest
from hub.io import canonical_json as canonical
from hub.io.disk import disk_errors
from hub.io.parallel import Workers
from hub.ref import LATEST, AdapterRef, check_alias, name_key
from hub.storage import oci_index
from hub.storage.blobs import Blobs
from hub.storage.ledger import Event, Ledger, Op
from hub.storage.releases import Catalogue, Release, choose, refuse_aliased, refuse_conflict, refuse_moved
from hub.storage.signatures import Signatures
from hub.storage.staging import AGAIN, Staging

if TYPE_CHECKING:
    from filelock import FileLock

    from hub.contents.tensor_files import FileScan
    from hub.manifest import FileEntry, Manifest

LOCK_TIMEOUT = 120.0  # seconds

_TRIES = 3  # a collector may remove what an ingestion relies on; then it fetches again, in the end under the lock

_one_lock_each = threading.Lock()  # a FileLock is reentrant only as one object

Fetch = Callable[["FileEntry", Path], None]


class Collected(IntegrityError):
    """A blob that a publication needs is not here: never sent, or removed by a collector meanwhile."""


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
        self.signatures = Signatures(self.root)
        self._lock: FileLock | None = None
        self._turn = threading.RLock()

    @property
    def exists(self) -> bool:
        """Whether anything was ever written here."""
        return self.ledger.path.exists() or (self.root / "oci-layout").exists()

    def create(self) -> None:
        """Make the layout where it is not there yet. Raises StoreError (no permission, read-only, full)."""
        from hub.io.files import atomic_write, make_directory
        from hub.storage.oci import LAYOUT

        with disk_errors(self.root):
            make_directory(self.root)
            if not (
                mark := self.root / "oci-layout"
            ).exists():  # first, so that nobody takes it for a foreign directory
                atomic_write(mark, LAYOUT)
            make_directory(self.blobs.directory)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store's lock, across threads and processes; makes the layout first. It may be nested.

        Raises
        ------
        StoreError
            No permission, read-only, full, or locked by another process for `LOCK_TIMEOUT` seconds.
        """
        from filelock import FileLock, Timeout

        from hub.io.files import group_mode

        with _one_lock_each:
            if self._lock is None:
                self.create()
                mode = group_mode(self.root, 0o644)
                self._lock = FileLock(self.root / ".lock", timeout=LOCK_TIMEOUT, poll_interval=0.01, mode=mode)
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
        live = dict[str | None, str]()
        for event, _ in self.ledger.read():
            if event.op == "publish":
                live[event.digest] = event.name
            elif event.op in ("delete", "evict"):
                live.pop(event.digest, None)
        return sorted({name_key(name): name for name in live.values()}.values(), key=name_key)

    def resolve(self, ref: str | AdapterRef) -> Release:
        """Pick the release a ref stands for; NotFound with did-you-mean."""
        ref = AdapterRef.parse(ref)
        catalogue = self.catalogue(ref.id)
        if not catalogue.releases:
            names = self.names()
            same = [name for name in names if name_key(name.split("/")[1]) == name_key(ref.name)]
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

    def ingest(self, manifest: Manifest, fetch: Fetch, *, reuse: bool, workers: Workers | None = None) -> bool:
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
        workers
            Fetches and checks several files at once; without it, one after the other.

        Returns
        -------
        bool
            Whether it is new here.

        Raises
        ------
        IntegrityError, GateError
            Bytes that are not what the manifest says, or that must not be admitted; nothing is published then.
        """
        from hub.contents.checks import check_file_set

        self.refuse_conflict(manifest)
        check_file_set((entry.path for entry in manifest.files), manifest)
        self.create()
        with disk_errors(self.root), self.staging.room() as room:
            for _ in range(_TRIES - 1):
                with suppress(Collected):
                    return self._ingest(manifest, fetch, room, reuse, workers or Workers())
            with self.lock():  # under which nobody collects
                return self._ingest(manifest, fetch, room, reuse, workers or Workers())

    def _ingest(self, manifest: Manifest, fetch: Fetch, room: Path, reuse: bool, workers: Workers) -> bool:
        from hub.contents.checks import check_agreement

        alike: dict[str, list[FileEntry]] = {}  # files of the same bytes are one blob, and one job
        for entry in manifest.files:
            alike.setdefault(entry.digest, []).append(entry)

        def admit(entries: list[FileEntry]) -> list[tuple[str, FileScan | None]]:
            return [(entry.path, self._admit(manifest, entry, fetch, room, reuse)) for entry in entries]

        admitted = workers.map(admit, list(alike.values()))
        check_agreement(manifest, {path: scan for some in admitted for path, scan in some if scan is not None})
        return self.publish(manifest, room)

    def _admit(self, manifest: Manifest, entry: FileEntry, fetch: Fetch, room: Path, reuse: bool) -> FileScan | None:
        from hub.contents.checks import REPACK, inspect_as

        # What is here already is not fetched, but read all the same: a blob that is damaged is fetched again, which
        # mends it; so is one that a collector takes meanwhile.
        if reuse and self.blobs.has(entry.digest, entry.size):
            self.blobs.keep(entry.digest)
            with suppress(IntegrityError, NotFound):
                return inspect_as(manifest, entry, self.blobs.path(entry.digest))
        # Fetch to a place that no reader knows; a large file is scanned while it still arrives.
        staged = self.staging.claim(entry.digest, room) if reuse else room / entry.sha256
        resumed = staged.exists()
        with following(staged, entry) as follower:
            fetch(entry, staged)
        scanned = None if follower is None else follower.scan
        # Only what has passed every check gets the name of its digest.
        try:
            scan = inspect_as(manifest, entry, staged, hint=AGAIN if reuse else REPACK, scanned=scanned)
        except HubError:
            staged.unlink(missing_ok=True)  # whole and wrong: nothing to resume
            if resumed:  # what an earlier try has left may be what is wrong
                return self._admit(manifest, entry, fetch, room, reuse)
            raise
        self.blobs.adopt(staged, entry.digest)
        return scan

    def publish(self, manifest: Manifest, room: Path) -> bool:
        """Write the manifest and the log entry of an artifact whose file blobs are here."""
        from hub.storage.oci import image_manifest

        # The manifests are blobs too; they are written outside the lock, which others wait for.
        self.refuse_conflict(manifest)
        self._refuse_gaps(manifest)
        self.blobs.add(manifest.canonical, room)
        self.blobs.add(image_manifest(manifest.canonical), room)
        # Under the lock everything is looked at again: another push or a collector may have been here since.
        with self.lock():
            if self.refuse_conflict(manifest):
                return False
            self._refuse_gaps(manifest)
            for digest in (manifest.digest, canonical.digest(image_manifest(manifest.canonical))):
                if not self.blobs.has(digest):
                    raise _collected(manifest, f"the blob {digest[:19]}...")
            self._commit(Event("publish", manifest.name, manifest.digest, version=manifest.version))
        return True

    def _refuse_gaps(self, manifest: Manifest) -> None:
        for entry in manifest.files:
            if not self.blobs.has(entry.digest, entry.size):
                raise _collected(manifest, f"the blob of {entry.path}")

    def set_alias(self, ref: AdapterRef, alias: str, *, expect: str | None = None, remove: bool = False) -> str | None:
        """Move or remove an alias, by compare-and-swap where `expect` is given.

        Parameters
        ----------
        ref
            What the alias shall stand for (its name alone counts for a removal).
        alias
            The alias.
        expect
            Where the alias must stand now: a version, a digest or `hub.storage.releases.ABSENT`; None: anywhere.
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
            refuse_moved(catalogue, alias, expect)
            if before != target:
                self._commit(Event("alias", catalogue.name, target, alias=alias))
        return before

    def yank(self, ref: str | AdapterRef, reason: str | None, *, note: str | None = None) -> Release:
        """Yank a release with a reason, or take that back (None; the log keeps the note why).

        It stays readable by an exact pin.
        """
        ref = AdapterRef.parse(ref)
        with self.lock():
            release = self.resolve(ref)
            if release.yanked != reason:
                op: Op = "unyank" if reason is None else "yank"
                self._commit(Event(op, ref.id, release.digest, version=release.version, reason=reason or note))
        return Release(release.version, release.digest, reason)

    def bury(self, ref: str | AdapterRef, reason: str | None, *, final: bool = True) -> Release:
        """Take a release out of the log's view; its blobs go with the next collection.

        Parameters
        ----------
        ref
            One version, alias or digest.
        reason
            Why; shown to whoever asks for it later.
        final
            The version never comes back. Else it only made room, and the very same digest may.

        Raises
        ------
        Conflict
            An alias stands on it.
        """
        ref = AdapterRef.parse(ref)
        with self.lock():
            release = self.resolve(ref)
            refuse_aliased(self.catalogue(ref.id), release, where=self.where)
            op: Op = "delete" if final else "evict"
            self._commit(Event(op, ref.id, release.digest, version=release.version, reason=reason))
        return release

    def _commit(self, event: Event) -> None:
        at = self.ledger.append(event, self.ledger.end())
        # It has happened. What follows can be made anew from the log, so a disk that is full by now fails nothing.
        with suppress(OSError, sqlite3.OperationalError):
            self._appended()
            oci_index.refresh(self.root, self.ledger, self.blobs, at, self.catalogue(event.name))

    def _appended(self) -> None:
        """Called under the lock when the log has grown; a store brings its index up to it."""


def _collected(manifest: Manifest, what: str) -> Collected:
    return Collected(f"{manifest.ref}: {what} is not here", ref=manifest.ref, hint="push or pull it again")
