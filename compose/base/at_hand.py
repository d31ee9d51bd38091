"""Where the base that a manifest identifies is on this machine. Imports no torch."""

from __future__ import annotations

from compose.base.fingerprint import config_digest
from compose.base.location import BUILTIN, Location, locate
from hub.errors import HubError
from hub.manifest import BaseIdentity
from hub.project.known_bases import KnownBases


def at_hand(base: BaseIdentity) -> str:
    """What `compose.base.location.locate` takes for a base: where it was last measured here, else its name.

    The weights are not read: whoever loads them compares them with the identity.
    """
    if base.repo.startswith(BUILTIN):
        return base.repo
    directory = KnownBases().directory(base.weights_fingerprint)
    if directory is not None and config_digest(directory) == base.config_digest:
        return str(directory)
    return base.repo if base.revision is None else f"{base.repo}@{base.revision}"


def config_at_hand(base: BaseIdentity) -> Location | None:
    """Where the config of a base is on this machine; None where it is not, or is another one's. Downloads nothing."""
    try:
        where = locate(at_hand(base), offline=True, files=("config.json",))
        return where if config_digest(where.directory) == base.config_digest else None
    except HubError:
        return None
