"""What the operating system says about a disk, as a StoreError that says what to do."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hub.errors import StoreError

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
def tensor_file(path: Path) -> Iterator[None]:
    """Raise OSError where safetensors, which is writing this file, tells of a full disk in an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


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
