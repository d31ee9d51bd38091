"""Content-addressed bytes: ``blobs/sha256/<hex>``, written whole or not at all, never changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hub.errors import IntegrityError, NotFound
from hub.io import canonical_json as canonical
from hub.io.files import fsync_directory, fsync_file, read_capped, sha256_file
from hub.ref import check_digest


class Blobs:
    """The blob directory of an OCI image layout."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "blobs" / "sha256"

    def path(self, digest: str) -> Path:
        """Where a blob is or would be; the digest is checked before it meets a path."""
        return self.directory / check_digest(digest).removeprefix("sha256:")

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether the blob is here, with that many bytes where `size` is given."""
        try:
            stat = self.path(digest).stat()
        except FileNotFoundError:
            return False
        return size is None or stat.st_size == size

    def adopt(self, staged: Path, digest: str) -> None:
        """Move a staged file, whose digest the caller has checked, to its place; durable when it returns."""
        fsync_file(staged)
        staged.chmod(0o444)  # a blob is immutable; this stops the careless editor
        staged.replace(self.path(digest))
        fsync_directory(self.directory)

    def add(self, data: bytes, staging: Path) -> str:
        """Store small bytes; returns their digest. A blob of that name with other bytes is damaged, and mended."""
        digest = canonical.digest(data)
        if self.check(digest, len(data)) is None:
            self.keep(digest)
        else:
            staged = staging / digest.removeprefix("sha256:")
            staged.write_bytes(data)
            self.adopt(staged, digest)
        return digest

    def keep(self, digest: str) -> None:
        """Make a blob young again, so that a collector leaves it to whoever is about to publish it."""
        with suppress(FileNotFoundError, PermissionError):  # gone, or another user's: publishing looks again
            os.utime(self.path(digest))

    def read(self, digest: str, limit: int = canonical.MAX_JSON) -> bytes:
        """All bytes of a small blob, checked against the digest."""
        try:
            data = read_capped(self.path(digest), limit)
        except NotFound as error:
            raise NotFound(f"blob {digest} is not in the store", digest=digest, path=error.path) from error
        if canonical.digest(data) != digest:
            raise IntegrityError(
                f"blob {digest} is damaged: its bytes have the digest {canonical.digest(data)}",
                digest=digest,
                path=self.path(digest),
                hint="`hub verify` lists all damage; pull or push the artifact again to mend it",
            )
        return data

    def check(self, digest: str, size: int) -> str | None:
        """One sentence about what is wrong with a blob, or None when every byte is right."""
        path = self.path(digest)
        try:
            sha256, count = sha256_file(path)
        except NotFound:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if count != size:
            return f"is {'truncated' if count < size else 'too long'}: {count} bytes instead of {size}"
        return None if f"sha256:{sha256}" == digest else f"is damaged: its bytes have the digest sha256:{sha256}"

    def __iter__(self) -> Iterator[str]:
        """Digests of all blobs."""
        if self.directory.is_dir():
            with os.scandir(self.directory) as entries:
                yield from (f"sha256:{entry.name}" for entry in entries if len(entry.name) == 64)
