"""Git object ids, as clients of the Hugging Face protocol expect them: blobs, LFS pointers, trees, commits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hub.io.files import CHUNK, open_regular

LFS_FROM = 10 * 2**20  # bytes from which any file is shown as a large one
_LFS_SUFFIXES = (".safetensors",)


@dataclass(frozen=True, slots=True)
class File:
    """Content of one file: hex sha256 and size in bytes."""

    sha256: str
    size: int

    @property
    def digest(self) -> str:
        """``sha256:`` and the hex digest."""
        return f"sha256:{self.sha256}"


def is_large(path: str, size: int) -> bool:
    """Whether a file is shown as a large one (git-lfs): its sha256 is then known without a download."""
    return path.endswith(_LFS_SUFFIXES) or size >= LFS_FROM


def _oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def blob_hasher(size: int) -> hashlib._Hash:
    """Return a hasher that gives the id of a blob once it has been fed `size` bytes."""
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def blob_of_file(path: Path) -> str:
    """Id of a file's content as a git blob; reads the file once."""
    with open_regular(path) as file:
        hasher = blob_hasher(path.stat().st_size)
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def pointer(file: File) -> bytes:
    """Text of the git-lfs pointer that stands for a large file (git-lfs, docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n".encode()


def pointer_oid(file: File) -> str:
    """Id of the pointer as a git blob."""
    return _oid("blob", pointer(file))


def trees(blobs: Mapping[str, str]) -> dict[str, str]:
    """Ids of all directories.

    Parameters
    ----------
    blobs
        Path of each file -> the id of its blob.

    Returns
    -------
    dict
        Path of each directory -> the id of its tree; the root has the path ``""``.
    """
    below: dict[str, list[tuple[str, str, str]]] = {"": []}  # directory -> (name, mode, id)
    for path, oid in blobs.items():
        parent = path.rpartition("/")[0]
        _ensure(below, parent)
        below[parent].append((path.rpartition("/")[2], "100644", oid))
    oids: dict[str, str] = {}
    for directory in sorted(below, key=lambda path: path.count("/") if path else -1, reverse=True):
        oids[directory] = _tree_oid(below[directory])
        if directory:
            parent, _, name = directory.rpartition("/")
            below[parent].append((name, "40000", oids[directory]))
    return oids


def _ensure(below: dict[str, list[tuple[str, str, str]]], directory: str) -> None:
    while directory not in below:
        below[directory] = []
        directory = directory.rpartition("/")[0]


def _tree_oid(entries: Iterable[tuple[str, str, str]]) -> str:
    # Git sorts directories as if their names ended in a slash.
    ordered = sorted(entries, key=lambda entry: (entry[0] + ("/" if entry[1] == "40000" else "")).encode())
    return _oid("tree", b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, mode, oid in ordered))


def commit_oid(tree: str, parents: Iterable[str], author: str, time: datetime, message: str) -> str:
    """Id of a commit; author and committer are the same, at UTC."""
    who = f"{author} <{author}@registry> {int(time.timestamp())} +0000"
    lines = [f"tree {tree}", *(f"parent {oid}" for oid in parents), f"author {who}", f"committer {who}", "", message]
    return _oid("commit", "\n".join(lines).encode("utf-8", "replace"))
