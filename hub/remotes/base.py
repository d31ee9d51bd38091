"""What every remote can do, and how a URL finds its remote.

A new remote is one file in this folder (or any package's ``hub.remotes`` entry point) with a class under
``@REMOTES.register("scheme")``; nothing else changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hub.errors import UsageError, suggest
from hub.plugins import Registry
from hub.storage.releases import Catalogue
from hub.storage.staging import Advance

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

_SCHEME = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://")


class Remote(Protocol):
    """A place that holds artifacts. It is never trusted: `hub.transfer` checks every byte that comes from it.

    A blob is always asked for together with its manifest, since many places (a repository of the Hugging Face
    Hub, of an OCI registry) keep blobs below a name and do not know a global one.
    """

    url: str
    checks_uploads: bool
    """Whether `write` compares the bytes with the digest while it reads them; else they are checked before."""

    def keep_private(self) -> None:
        """Let what is made here from now on be private. Raises UsageError where this place knows no such thing."""
        ...

    def names(self) -> list[str]:
        """All ``ns/name`` here, sorted; for did-you-mean and search."""
        ...

    def catalogue(self, name: str) -> Catalogue:
        """Releases and aliases of a name; an empty catalogue where it is unknown."""
        ...

    def manifest(self, name: str, digest: str) -> bytes:
        """Bytes of a manifest. Raises NotFound."""
        ...

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """Files of an artifact whose blobs are not here yet: the digest difference."""
        ...

    def read(self, manifest: Manifest, entry: FileEntry, offset: int) -> Iterable[bytes]:
        """Bytes of a file from an offset on, in chunks. Raises NotFound."""
        ...

    def write(self, manifest: Manifest, entry: FileEntry, source: Path, advance: Advance) -> None:
        """Take in one blob, whole or not at all; telling `advance` of every count of bytes."""
        ...

    def publish(self, manifest: Manifest) -> bool:
        """Make the artifact visible, after all its blobs; whether it is new. Raises Conflict."""
        ...

    def tag(self, name: str, alias: str, digest: str) -> None:
        """Let an alias stand for a published digest."""
        ...

    def yank(self, name: str, digest: str, reason: str | None) -> None:
        """Yank a published digest with a reason, or take that back (None)."""
        ...

    def delete(self, name: str, digest: str, reason: str) -> None:
        """Delete a release for good: its number is never used again.

        Raises Conflict where an alias stands on it, and UsageError where this place cannot do that.
        """
        ...

    def signatures(self, name: str, digest: str) -> dict[str, bytes]:
        """Signatures of a release by the name of their key, as they are kept here; none of them is believed."""
        ...

    def sign(self, name: str, digest: str, signatures: Mapping[str, bytes]) -> None:
        """Keep signatures of a published release beside it, those that are here already included."""
        ...


Opener = Callable[[str], Remote]
REMOTES = Registry[Opener]("remote", package="hub.remotes", group="hub.remotes")
"""URL scheme -> what opens a URL of it, most often a class."""


def from_url(url: str) -> Remote:
    """Open a remote: ``scheme://...``, or a plain path, which is a directory.

    Raises
    ------
    UsageError
        An unknown scheme, with did-you-mean; one whose package is broken; a user, a password or a query in the URL.
    """
    refuse_secrets(url)
    match = _SCHEME.match(url)
    scheme = match["scheme"].lower() if match else "file"
    if scheme not in REMOTES and not any(broken.name == scheme for broken in REMOTES.broken()):
        hint = suggest(scheme, REMOTES) or f"known are {', '.join(REMOTES)}, and plain paths"
        raise UsageError(f"there is no remote for {scheme}:// ({url})", hint=hint)
    return REMOTES.get(scheme)(url)


def no_privacy(url: str, hint: str) -> UsageError:
    """What `Remote.keep_private` raises where the place itself says who may read it."""
    return UsageError(f"{url} has no private adapters: who may read it sees all of them", hint=hint)


def refuse_secrets(url: str) -> None:
    """Refuse a URL that carries credentials: they would end up in files, in messages and in the shell's history.

    Raises
    ------
    UsageError
        It shows the URL without them.
    """
    match = _SCHEME.match(url)
    if match is None:
        return
    rest = url[match.end() :]
    place, query, _ = rest.partition("?")
    host = place.partition("/")[0]
    if "@" in host or query:
        bare = f"{match['scheme']}://{host.rpartition('@')[2]}{place[len(host) :]}"
        raise UsageError(
            f"the URL of {bare} carries a user, a password or a query, which do not belong there",
            hint=f"write {bare}; credentials come from the environment, or from the login of the service's own client",
        )
