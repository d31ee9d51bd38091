"""A project and its machine: ``modules.lock``, what is newer, what is broken, what nothing needs any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hub.api.places import moving, open_place
from hub.errors import UsageError

if TYPE_CHECKING:
    from hub.console.progress import Progress
    from hub.project.doctor import Finding
    from hub.project.gc import Plan
    from hub.project.lock import Lock
    from hub.project.outdated import Newer
    from hub.storage.artifact import Artifact
    from hub.store import Store

LOCK = "modules.lock"


def lock(
    refs: Sequence[str] = (),
    *,
    path: str | Path = LOCK,
    from_: str | None = None,
    upgrade: bool = False,
    store: Store | None = None,
) -> Lock:
    """Pin refs, and all that they require, by digest in ``path``; what is locked stays, unless ``upgrade``.

    Without ``refs``, what ``modules.yaml`` or ``modules.toml`` beside it asks for, or what is locked already.

    Raises
    ------
    UsageError
        Nothing was asked for.
    NotFound
        A ref that nothing fits.
    """
    from hub.project.lock import Lock, Resolver, Roots, as_written, beside, read_wishes
    from hub.project.named_remotes import Remotes
    from hub.ref import AdapterRef
    from hub.store import Store

    store, path = store or Store(), Path(path)
    locked = Lock.load(path) if path.exists() else None
    wishes = read_wishes(path.parent)
    wanted = [str(AdapterRef.parse(ref)) for ref in refs] or (wishes[0] if wishes else [])
    wanted = wanted or (list(locked.requires) if locked else [])
    if not wanted:
        raise UsageError("what shall be locked?", hint="write refs, or a modules.yaml with `requires: [acme/tone>=1]`")
    place = from_ or (beside(wishes[1], path.parent) if wishes and wishes[1] else None)
    named = as_written(place if place is None else Remotes().url(place), path.parent)
    pinned = Resolver(store, open_place(place), None if upgrade else locked, named).lock(wanted)
    pinned.save(path)
    Roots(store).add(store, path)
    return pinned


def sync(
    path: str | Path = LOCK,
    *,
    from_: str | None = None,
    jobs: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> list[tuple[Artifact, bool]]:
    """Bring exactly what a lock says into the store, every byte checked.

    Returns
    -------
    Each artifact of the lock, and whether it had to be fetched.
    """
    from hub.project import lock as locks
    from hub.store import Store

    store, path = store or Store(), Path(path)
    locked, wishes = locks.Lock.load(path), locks.read_wishes(path.parent)
    if wishes is not None and set(wishes[0]) != set(locked.requires):
        raise UsageError(f"{path} is not the lock of what is asked for beside it", hint="run `hub lock` first")
    artifacts = list(locks.sync(locked, store, open_place(from_), directory=path.parent, **moving(progress, jobs)))
    locks.Roots(store).add(store, path)
    return artifacts


def outdated(path: str | Path = LOCK, *, from_: str | None = None, store: Store | None = None) -> list[Newer]:
    """What has a newer version, or was yanked, against a lock; without a lock, the whole store against a remote."""
    from hub.project.outdated import outdated as compare
    from hub.store import Store

    return compare(store or Store(), open_place(from_), Path(path))


def doctor(*, offline: bool = False, store: Store | None = None) -> Iterator[Finding]:
    """Look for what is broken in the environment, the store and, unless ``offline``, the remotes; one by one."""
    from hub.project.doctor import examine
    from hub.store import Store

    return examine(store or Store(), offline=offline)


def gc(
    *, run: bool = False, superseded: bool = False, grace: float = 3600.0, store: Store | None = None
) -> tuple[Plan, int]:
    """What nothing needs any more; with ``run`` it is removed. See `hub.project.gc.plan` for ``superseded``, ``grace``.

    Returns
    -------
    What goes, and the bytes that were freed (0 without ``run``).
    """
    from hub.project.gc import collect, plan
    from hub.store import Store

    store = store or Store()
    removal = plan(store, superseded=superseded, grace=grace)
    return removal, collect(store, removal, grace=grace) if run else 0
