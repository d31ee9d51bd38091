"""A directory as a remote: any store is one, on this disk, a mounted share or a stick."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hub.errors import NotFound, UsageError
from hub.io.disk import disk_errors
from hub.io.files import CHUNK, open_regular
from hub.ref import AdapterRef
from hub.remotes.base import REMOTES, no_privacy
from hub.storage.releases import Catalogue
from hub.storage.staging import Advance
from hub.storage.vault import Vault

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest


@REMOTES.register("file")
class DirectoryRemote:
    """Blobs and log of a store's directory; its index is left alone, so a network share will do.

    Parameters
    ----------
    url
        A path, or ``file:///path``. It is made by the first push.
    """

    checks_uploads = True

    def __init__(self, url: str) -> None:
        self.path = _path(url)
        self.url = str(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is not a directory")
        self._vault = Vault(self.path)

    def keep_private(self) -> None:
        """Refuse."""
        raise no_privacy(self.url, "the modes of the directory say who may read it: chmod")

    def names(self) -> list[str]:
        """All names in the log."""
        return self._vault.names()

    def catalogue(self, name: str) -> Catalogue:
        """Replay the log for one name."""
        if self._is_foreign():
            if (self.path / "module.json").exists():
                hint = f"it is an artifact directory: `hub push {self.path}` publishes it"
            else:
                hint = "give the directory that was pushed to, a HUB_HOME, or an empty or new directory"
            raise NotFound(f"{self.path} is no store (it has no log.jsonl)", path=self.path, hint=hint)
        return self._vault.catalogue(name)

    def _is_foreign(self) -> bool:
        """Whether something else lives here; hidden files may be those of another process that is making the store."""
        if not self.path.exists() or self._vault.exists:
            return False
        return any(not entry.name.startswith(".") for entry in self.path.iterdir()) and not self._vault.exists

    def manifest(self, name: str, digest: str) -> bytes:
        """Read the manifest blob."""
        return self._vault.blobs.read(digest)

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """Files whose blob is not here, or not whole: a damaged one is sent again, which mends it."""
        blobs = self._vault.blobs
        lacks = [entry for entry in manifest.files if blobs.check(entry.digest, entry.size) is not None]
        for entry in manifest.files:
            if entry not in lacks:
                blobs.keep(entry.digest)
        return lacks

    def read(self, manifest: Manifest, entry: FileEntry, offset: int) -> Iterable[bytes]:
        """Bytes of the blob from the offset on."""
        try:
            source = open_regular(self._vault.blobs.path(entry.digest))
        except NotFound as error:
            raise NotFound(
                f"{self.path} has lost {entry.path} of {manifest.ref}",
                ref=manifest.ref,
                digest=entry.digest,
                path=error.path,
                hint="push it there again",
            ) from error
        with source as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    def write(self, manifest: Manifest, entry: FileEntry, source: Path, advance: Advance) -> None:
        """Copy a blob in, going on where a killed push has stopped, and check it before it gets its name."""

        def read(offset: int) -> Iterable[bytes]:
            with open_regular(source) as file:
                file.seek(offset)
                while chunk := file.read(CHUNK):
                    yield chunk

        self._vault.create()
        with disk_errors(self.path), self._vault.staging.room() as room:
            part = self._vault.staging.claim(entry.digest, room)
            self._vault.staging.receive(entry, part, read, advance)
            self._vault.blobs.adopt(part, entry.digest)

    def publish(self, manifest: Manifest) -> bool:
        """Write the manifest and the log entry."""
        self._vault.create()
        with disk_errors(self.path), self._vault.staging.room() as room:
            return self._vault.publish(manifest, room)

    def tag(self, name: str, alias: str, digest: str) -> None:
        """Move the alias here."""
        self._vault.set_alias(AdapterRef.parse(name).at(digest=digest), alias)

    def yank(self, name: str, digest: str, reason: str | None) -> None:
        """Yank here, or take that back."""
        self._vault.yank(AdapterRef.parse(name).at(digest=digest), reason)

    def delete(self, name: str, digest: str, reason: str) -> None:
        """Bury it here; `hub gc` with HUB_HOME at this directory frees its space."""
        self._vault.bury(AdapterRef.parse(name).at(digest=digest), reason)

    def signatures(self, name: str, digest: str) -> dict[str, bytes]:
        """Read them from where a store keeps them."""
        return self._vault.signatures.of(digest)

    def sign(self, name: str, digest: str, signatures: Mapping[str, bytes]) -> None:
        """Write those that are not here."""
        with disk_errors(self.path):
            for key, data in signatures.items():
                self._vault.signatures.add(digest, key, data)


def _path(url: str) -> Path:
    if not url.lower().startswith("file://"):
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{url} names the host {parts.netloc!r}", hint="write file:///absolute/path")
    return Path(unquote(parts.path))
