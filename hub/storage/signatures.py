"""Where a store keeps signatures: beside the blobs, by digest of the artifact and name of the key.

They are not part of the artifact, whose digest they must not change, and nothing here believes them: they travel with
the artifact, and `hub.signing.check` says whether one holds for a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hub.errors import HubError
from hub.io.files import atomic_write, make_directory, read_capped
from hub.ref import check_digest

MAX_SIGNATURE = 4 * 2**20  # bytes; it holds one sha256 a file
MAX_KEYS = 64  # signatures of one artifact that travel
_KEY = re.compile(r"[0-9a-f]{64}\Z")


def names_key(text: str) -> bool:
    """Whether a text can be the name of a key: the hex sha256 of its public PEM."""
    return _KEY.match(text) is not None


def fitting(signatures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Of what a remote has sent, that which can be a signature by its name and size; at most `MAX_KEYS`."""
    good = {key: data for key, data in sorted(signatures.items()) if names_key(key) and len(data) <= MAX_SIGNATURE}
    return dict(list(good.items())[:MAX_KEYS])


class Signatures:
    """The ``signatures/`` directory of a store: ``<digest>/<key>.json``."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "signatures"

    def path(self, digest: str, key: str) -> Path:
        """Where the signature of an artifact by a key is, or would be."""
        return self._folder(digest) / f"{key}.json"

    def of(self, digest: str) -> dict[str, bytes]:
        """Name of the key -> signature; what is too large or no plain file is passed over."""
        folder, signatures = self._folder(digest), dict[str, bytes]()
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                signatures[path.stem] = read_capped(path, MAX_SIGNATURE)
            except HubError:
                continue
        return fitting(signatures)

    def add(self, digest: str, key: str, data: bytes) -> None:
        """Keep a signature that came with an artifact; one that is here stays, since it may be the good one."""
        path = self.path(digest, key)
        if not path.exists():
            make_directory(path.parent)
            atomic_write(path, data)

    def _folder(self, digest: str) -> Path:
        return self.directory / check_digest(digest).removeprefix("sha256:")
