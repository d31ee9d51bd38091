"""A large safetensors file is scanned while it is still being written, so that the check costs hardly any time.

What is read is the file itself, behind its writer. The file may only be appended to meanwhile; one that was replaced
is noticed, and then scanned once more by whoever needs the scan.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hub.errors import HubError
from hub.io.files import flushing, open_regular

if TYPE_CHECKING:
    from hub.contents.tensor_files import FileScan
    from hub.manifest import FileEntry

LARGE = 16 * 2**20  # bytes; below, a thread costs more than it saves
_PAUSE = 0.003  # seconds between two looks at the file


class Follower:
    """The scan of a file that grows, in a thread of its own; `scan` is None where there is none to be had.

    Parameters
    ----------
    path
        The file; it need not be there yet.
    entry
        Size that it will have, and what errors call it.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self.scan: FileScan | None = None
        self._path, self._entry = path, entry
        self._over, self._abandoned = threading.Event(), False
        self._file: BinaryIO | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """Begin, before the first byte is there."""
        self._thread.start()

    def finish(self) -> None:
        """Wait for the rest of the scan: all has been written, and must be the very file that was read."""
        self._over.set()
        with flushing(self._path):
            self._thread.join()
        if self._file is None:
            return
        with self._file as file:  # open until now, so that no other file can have got its number
            read = os.fstat(file.fileno())
            try:
                same = os.path.samestat(read, self._path.stat())
            except FileNotFoundError:
                same = False
        if not same or read.st_size != self._entry.size:
            self.scan = None

    def abandon(self) -> None:
        """Stop: nothing more will be written."""
        self._abandoned = True
        self._over.set()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def _follow(self) -> None:
        from hub.contents.tensor_files import scan_stream

        while not self._path.exists():
            if self._over.wait(_PAUSE) and not self._path.exists():
                return
        try:
            self._file = open_regular(self._path)
            self.scan = scan_stream(_GrowingFile(self._file, self), self._entry.size, self._entry.path)
        except (HubError, OSError):  # whoever needs the scan reads the whole file, and says what is wrong with it
            return

    def await_size(self, file: BinaryIO, size: int) -> None:
        """Wait until a file has so many bytes, or will not grow any more."""
        while not self._abandoned and os.fstat(file.fileno()).st_size < size:
            if self._over.wait(_PAUSE):
                return


class _GrowingFile:
    """A file that waits for the bytes that are asked for."""

    def __init__(self, file: BinaryIO, follower: Follower) -> None:
        self._file, self._follower = file, follower

    def read(self, count: int) -> bytes:
        self._follower.await_size(self._file, self._file.tell() + count)
        return self._file.read(count)

    def readinto(self, buffer: memoryview) -> int:
        self._follower.await_size(self._file, self._file.tell() + len(buffer))
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        return count


@contextmanager
def following(path: Path, entry: FileEntry) -> Iterator[Follower | None]:
    """Scan what is written within: gives the follower, or None where the file is none that is worth it."""
    if entry.size < LARGE or not entry.path.endswith(".safetensors"):
        yield None
        return
    follower = Follower(path, entry)
    follower.start()
    try:
        yield follower
    except BaseException:
        follower.abandon()
        raise
    follower.finish()
