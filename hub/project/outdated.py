"""What has a newer version than a lock says, or than the store has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hub.errors import NotFound, UsageError
from hub.project.lock import Lock, Pin, beside
from hub.ref import AdapterRef, version_key
from hub.remotes import from_url
from hub.storage.releases import choose

if TYPE_CHECKING:
    from hub.remotes.base import Remote
    from hub.storage.releases import Catalogue
    from hub.store import Store


@dataclass(frozen=True)
class Newer:
    """One name: the version at hand, the highest that its range allows, the highest there is, and why it is yanked."""

    name: str
    current: str | None
    wanted: str | None
    latest: str | None
    yanked: str | None

    @property
    def matters(self) -> bool:
        """Whether there is anything to do about it."""
        if self.yanked or self.latest is None:
            return self.yanked is not None
        return self.current is None or version_key(self.latest) > version_key(self.current)

    def as_dict(self) -> dict[str, str | None]:
        """For JSON."""
        return asdict(self)


def outdated(store: Store, remote: Remote | None, path: Path) -> list[Newer]:
    """Compare the lock ``path``, or where there is none the whole store, with a remote.

    Raises
    ------
    UsageError
        There is neither a lock nor a remote.
    """
    if path.exists():
        locked = Lock.load(path)
        rows = [_locked(pin, locked, _catalogue(store, remote, pin, path.parent)) for pin in locked.modules]
    elif remote is not None:
        rows = [_stored(store, remote, name) for name in store.names()]
    else:
        raise UsageError(f"there is no {path}, and no remote to compare the store with", hint="add --from REMOTE")
    return [row for row in rows if row.matters]


def _catalogue(store: Store, remote: Remote | None, pin: Pin, directory: Path) -> Catalogue:
    if remote is not None or pin.source is not None:
        return (remote or from_url(beside(str(pin.source), directory))).catalogue(pin.name)
    return store.catalogue(pin.name)


def _locked(pin: Pin, locked: Lock, catalogue: Catalogue) -> Newer:
    asked = [ref for ref, digest in locked.decided().items() if digest == pin.digest]
    release = catalogue.find(digest=pin.digest)
    wanted, latest = _version(asked[0] if asked else pin.name, catalogue), _version(pin.name, catalogue)
    return Newer(pin.name, pin.version, wanted, latest, release.yanked if release else None)


def _stored(store: Store, remote: Remote, name: str) -> Newer:
    here, there = store.catalogue(name), remote.catalogue(name)
    current, latest = _version(name, here), _version(name, there)
    release = there.find(version=current) if current else None
    return Newer(name, current, latest, latest, release.yanked if release else None)


def _version(ref: str, catalogue: Catalogue) -> str | None:
    """Version that a ref stands for in a catalogue; None where nothing fits."""
    try:
        return choose(AdapterRef.parse(ref), catalogue).version
    except NotFound:
        return None
