"""Room for files that are not whole yet, which survives no crash but hands on what can be resumed.

Each user holds a file lock inside its own directory; a directory whose lock is free belongs to a dead process.
What it had received of a blob moves to ``partial/``, so the next pull goes on from there.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hub.errors import IntegrityError
from hub.io.files import flushing, group_mode, make_directory, sha256_file, share
from hub.ref import check_digest

if TYPE_CHECKING:
    from hub.manifest import FileEntry

AGAIN = "try again; if it stays, the source is damaged: publish the artifact there again"

Read = Callable[[int], Iterable[bytes]]
Advance = Callable[[int], None]

_GRACE = 60.0  # seconds that a directory without a lock may be just about to get one
_PAUSE = 5.0  # seconds between two sweeps of one process; a sweep tries the lock of every room
_KEEP = 7 * 86400.0  # seconds that a partial blob waits to be resumed


class Staging:
    """The ``tmp/`` and ``partial/`` directories of a store."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "tmp"
        self.partial = root / "partial"
        self._swept = -_PAUSE

    @contextmanager
    def room(self) -> Iterator[Path]:
        """Give an own empty directory, gone afterwards; dead processes' directories are swept first."""
        from filelock import FileLock

        make_directory(self.directory)
        make_directory(self.partial)
        if time.monotonic() - self._swept >= _PAUSE:
            self._swept = time.monotonic()
            self.sweep()
        # Made under a hidden name and renamed once it is locked, so that no sweeper takes it for a dead one's.
        name = uuid.uuid4().hex[:16]
        young = self.directory / f".{name}"
        make_directory(young)
        lock = FileLock(young / "lock", mode=group_mode(young, 0o644))
        lock.acquire()
        room = young.rename(self.directory / name)
        try:
            yield room
        finally:
            self._rescue(room)
            shutil.rmtree(room, ignore_errors=True)
            lock.release()

    def sweep(self) -> None:
        """Remove directories of dead processes; never fails because of another sweeper."""
        from filelock import FileLock, Timeout

        now = time.time()
        # Whoever lives holds the lock in its room; the others' partial blobs are kept, the rest goes.
        for path in _entries(self.directory):
            with suppress(FileNotFoundError, FileExistsError):  # gone, or going while the lock file is looked for
                if path.name.startswith(".") and now - path.stat().st_mtime < _GRACE:
                    continue
                lock = FileLock(path / "lock", timeout=0)
                try:
                    with lock:
                        self._rescue(path)
                        shutil.rmtree(path, ignore_errors=True)
                except Timeout:
                    continue
        # Partial blobs that nobody came back for.
        for path in _entries(self.partial):
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime > _KEEP:
                    path.unlink()

    def claim(self, digest: str, room: Path) -> Path:
        """Path in `room` to write a blob to; holds what an earlier try has left, if anything.

        A rename is what claims a partial blob, so two processes never write to one.
        """
        name = check_digest(digest).removeprefix("sha256:")
        target = room / f"{name}.part"
        with suppress(FileNotFoundError):
            (self.partial / name).replace(target)
            if target.stat().st_uid != room.stat().st_uid:  # another user's: what becomes a blob must be our own
                copy = shutil.copyfile(target, target.with_suffix(".copy"))
                copy.replace(target)
        return target

    def complete(self, entry: FileEntry, part: Path, read: Read, advance: Advance) -> None:
        """Append what is missing to a partial file; its bytes are not checked, only their number.

        Parameters
        ----------
        entry
            Size that the file must have in the end.
        part
            From `claim`.
        read
            Gives the bytes from an offset on, in chunks.
        advance
            Told of every count of bytes that has arrived.

        Raises
        ------
        IntegrityError
            Too many bytes (they are thrown away) or too few (they are kept, to be completed).
        """
        size = part.stat().st_size if part.exists() else 0
        if size > entry.size:
            part.unlink()
            size = 0
        advance(size)
        with part.open("ab") as file:
            for chunk in read(size) if size < entry.size else ():
                size += len(chunk)
                if size > entry.size:
                    break
                file.write(chunk)
                file.flush()  # what is counted is there, whatever happens to this thread
                advance(len(chunk))
        if size > entry.size:
            part.unlink()
            raise _wrong(entry, "has more bytes than it should")
        if size < entry.size:
            raise _wrong(entry, f"is truncated at the source: {size} bytes instead of {entry.size}")

    def receive(self, entry: FileEntry, part: Path, read: Read, advance: Advance) -> None:
        """`complete` a partial file and check its digest; what an earlier try left and is wrong is fetched anew.

        Raises
        ------
        IntegrityError
            As `complete`, or wrong bytes (they are thrown away).
        """
        resumed = part.exists()
        self.complete(entry, part, read, advance)
        with flushing(part):
            whole = sha256_file(part)[0] == entry.sha256
        if whole:
            return
        part.unlink()
        if not resumed:
            raise _wrong(entry, "arrived with wrong bytes")
        advance(-entry.size)
        self.receive(entry, part, read, advance)

    def _rescue(self, room: Path) -> None:
        with suppress(FileNotFoundError):
            for path in room.glob("*.part"):
                if path.stat().st_size:
                    share(path)  # another user may go on with it
                    path.replace(self.partial / path.name.removesuffix(".part"))


def _wrong(entry: FileEntry, how: str) -> IntegrityError:
    return IntegrityError(
        f"{entry.path} {how} (digest {entry.digest[:19]}...)",
        digest=entry.digest,
        path=entry.path,
        hint=AGAIN,
    )


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
