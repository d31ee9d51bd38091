"""Room for files that are not whole yet, which survives no crash but hands on what can be resumed.

Each user holds a file lock inside its own directory; a directory whose lock is free belongs to a dead process.
What it had received of a blob moves to ``partial/``, so the next pull goes on from there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hub.errors import IntegrityError
from hub.files import CHUNK
from hub.ref import check_digest

if TYPE_CHECKING:
    from hub.manifest import FileEntry

Read = Callable[[int], Iterable[bytes]]
Advance = Callable[[int], None]

_GRACE = 60.0  # seconds that a directory without a lock may be just about to get one
_KEEP = 7 * 86400.0  # seconds that a partial blob waits to be resumed


class Staging:
    """The ``tmp/`` and ``partial/`` directories of a store."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "tmp"
        self.partial = root / "partial"

    @contextmanager
    def room(self) -> Iterator[Path]:
        """Give an own empty directory, gone afterwards; dead processes' directories are swept first."""
        from filelock import FileLock

        self.directory.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self.sweep()
        name = uuid.uuid4().hex[:16]
        young = self.directory / f".{name}"
        young.mkdir()
        lock = FileLock(young / "lock")
        lock.acquire()
        room = young.rename(self.directory / name)  # from here on, its name says that it is locked
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
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):
                if path.name.startswith(".") and now - path.stat().st_mtime < _GRACE:
                    continue
                lock = FileLock(path / "lock", timeout=0)
                try:
                    with lock:
                        self._rescue(path)
                        shutil.rmtree(path, ignore_errors=True)
                except Timeout:
                    continue
        for path in self.partial.iterdir():
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
        return target

    def receive(self, entry: FileEntry, part: Path, read: Read, advance: Advance) -> None:
        """Complete a partial file and check its digest; goes on from the bytes it holds already.

        Parameters
        ----------
        entry
            Size and digest that the file must have in the end.
        part
            From `claim`.
        read
            Gives the bytes from an offset on, in chunks.
        advance
            Told of every count of bytes that has arrived.

        Raises
        ------
        IntegrityError
            Too few bytes, too many, or wrong ones; what has arrived is thrown away unless it was merely cut off.
        """
        resumed = part.stat().st_size if part.exists() else 0
        if resumed > entry.size:
            part.unlink()
            resumed = 0
        problem = self._append(entry, part, read, advance, resumed)
        if problem and resumed:  # what the earlier try left may be wrong: begin again, once
            advance(-entry.size)
            part.unlink(missing_ok=True)
            problem = self._append(entry, part, read, advance, 0)
        if problem:
            raise IntegrityError(
                f"{entry.path} {problem} (digest {entry.digest[:19]}...)",
                digest=entry.digest,
                path=entry.path,
                hint="try again; if it stays, the source is damaged: publish the artifact there again",
            )

    def _append(self, entry: FileEntry, part: Path, read: Read, advance: Advance, start: int) -> str | None:
        hasher, size = hashlib.sha256(), start
        if start:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    hasher.update(chunk)
            advance(start)
        with part.open("ab") as file:
            for chunk in read(start) if start < entry.size else ():
                size += len(chunk)
                if size > entry.size:
                    break
                hasher.update(chunk)
                file.write(chunk)
                advance(len(chunk))
        if size < entry.size:
            return f"is truncated at the source: {size} bytes instead of {entry.size}"
        if size == entry.size and hasher.hexdigest() == entry.sha256:
            return None
        part.unlink()
        return "has more bytes than it should" if size > entry.size else "arrived with wrong bytes"

    def _rescue(self, room: Path) -> None:
        with suppress(FileNotFoundError):
            for path in room.glob("*.part"):
                if path.stat().st_size:
                    path.replace(self.partial / path.name.removesuffix(".part"))
