"""Files from outside and files that must be whole: safe paths, no links, atomic writes, hashing."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hub.errors import GateError, NotFound

CHUNK = 4 * 2**20  # bytes read at a time
MAX_DEPTH = 6
MAX_FILES = 10_000
_PART = re.compile(r"[A-Za-z0-9_+=@,-][A-Za-z0-9._+=@, -]*\Z")


def check_relative(path: str) -> str:
    """Return a POSIX path below an artifact's root unchanged, or raise ValueError.

    Refused: absolute paths, ``..`` and ``.``, hidden names, backslashes, drive letters, control characters,
    parts over 128 characters and more than six levels.
    """
    parts = path.split("/")
    if len(parts) > MAX_DEPTH:
        raise ValueError(f"path {path[:80]!r} is more than {MAX_DEPTH} levels deep")
    for part in parts:
        if not _PART.match(part) or ".." in part or part[-1] in ". " or len(part) > 128:
            raise ValueError(f"path {path[:80]!r} is not a plain relative path (at {part[:40]!r})")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; links, devices and pipes are refused by GateError."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise GateError(f"{path.name} is a symbolic link; artifacts hold plain files", path=path) from error
        if error.errno == errno.ENOENT:
            raise NotFound(f"{path} does not exist", path=path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise GateError(f"{path.name} is not a regular file", path=path)
    return os.fdopen(handle, "rb")


def walk(directory: Path, *, ignore: frozenset[str] = frozenset()) -> Iterator[str]:
    """Relative POSIX paths of all files below a directory, sorted; links and special files are refused.

    Raises
    ------
    GateError
        For a link, a device, a path that `check_relative` refuses, or more than `MAX_FILES` files.
    """
    for count, path in enumerate(_walk(directory, "", ignore)):
        if count >= MAX_FILES:
            raise GateError(f"{directory} holds more than {MAX_FILES} files", path=directory)
        try:
            yield check_relative(path)
        except ValueError as error:
            raise GateError(str(error), path=directory, hint="rename or remove the file") from error


def _walk(directory: Path, prefix: str, ignore: frozenset[str]) -> Iterator[str]:
    if prefix.count("/") > MAX_DEPTH:
        raise GateError(f"{directory} is more than {MAX_DEPTH} levels deep", path=directory)
    with os.scandir(directory) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name in ignore:
            continue
        if entry.is_symlink():
            raise GateError(f"{prefix}{entry.name} is a symbolic link; artifacts hold plain files", path=entry.path)
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", ignore)
        elif entry.is_file():
            yield prefix + entry.name
        else:
            raise GateError(f"{prefix}{entry.name} is not a regular file", path=entry.path)


def read_capped(path: Path, limit: int) -> bytes:
    """All bytes of a small regular file; GateError when it has more than `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= limit else b""  # nothing is allocated for what is refused
    if max(size, len(data)) > limit:
        raise GateError(f"{path.name} has more than {limit} bytes", path=path)
    return data


def sha256_file(path: Path) -> tuple[str, int]:
    """Hex sha256 and size in bytes of a regular file."""
    hasher, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK))
    with open_regular(path) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            hasher.update(buffer[:count])
            size += count
    return hasher.hexdigest(), size


def fsync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def flushing(path: Path) -> Iterator[None]:
    """Let the disk write a file's bytes while they are still being checked; `fsync_file` is then quick.

    It only saves time: what the disk says is asked of `fsync_file`, which comes before the bytes get a name.
    """

    def flush() -> None:
        with suppress(OSError):
            fsync_file(path)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def fsync_directory(path: Path) -> None:
    """Force a directory's names to the disk (a rename is durable only then)."""
    if os.name == "nt":  # Windows has no handle for that
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def group_mode(directory: Path, mode: int) -> int:
    """A mode for something new in a directory: where its group may write there, it may do so with this, too.

    A team's directory is ``chmod g+ws``; whoever works in it would otherwise have to remember a umask. Others may read
    what is new where they may read the directory.
    """
    theirs = directory.stat().st_mode
    return mode | (theirs & 0o064) if theirs & 0o020 else mode


def share(path: Path) -> None:
    """Give a file or directory that was just made the rights of the group of its directory; another user's stays."""
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = group_mode(path.parent, mode)
    if path.is_dir() and wanted != mode:
        wanted |= path.parent.stat().st_mode & 0o2011
    if wanted != mode:
        with suppress(PermissionError):
            path.chmod(wanted)


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, each with the rights that `share` gives."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    for place in reversed(missing):
        with suppress(FileExistsError):  # another thread was faster; it may not have come to its rights yet
            place.mkdir()
        share(place)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary file in the same directory, fsync, replace, fsync."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        share(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
