"""From a ref to one release: versions, ranges, aliases, digests; what is yanked is skipped unless pinned.

No solver: the highest version that fits and is not yanked wins, as PEP 440 orders them; a pre-release only where
nothing else fits (or the range names one).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from hub.errors import Conflict, NotFound, suggest
from hub.ref import LATEST, AdapterRef, version_key
from hub.storage.ledger import Event

ABSENT = "absent"  # the expectation that an alias does not exist yet


@dataclass(frozen=True, slots=True)
class Release:
    """One published version; `yanked` is the reason, or None."""

    version: str
    digest: str
    yanked: str | None = None


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A version that was here; `final` means it never comes back, else its very digest may."""

    version: str
    digest: str
    reason: str | None = None
    final: bool = True


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All that is known of one name: releases in version order, alias -> digest, and what is gone."""

    name: str
    releases: tuple[Release, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    tombstones: tuple[Tombstone, ...] = ()

    def find(self, *, version: str | None = None, digest: str | None = None) -> Release | None:
        """Release of that version (1.0 equals 1.0.0) or digest, or None."""
        key = None if version is None else version_key(version)
        for release in self.releases:
            if digest == release.digest or (key is not None and key == version_key(release.version)):
                return release
        return None

    def release(self, digest: str, *, where: str) -> Release:
        """Release of a digest. Raises NotFound."""
        release = self.find(digest=digest)
        if release is None:
            raise NotFound(
                f"{where} has no version of {self.name} with the digest {digest[:19]}...",
                ref=self.name,
                digest=digest,
                hint=_versions_hint(self) if self.releases else "push it there first",
            )
        return release

    def tombstone(self, version: str | None) -> Tombstone | None:
        """Tombstone of that version, or None."""
        key = None if version is None else version_key(version)
        return next((gone for gone in self.tombstones if version_key(gone.version) == key), None)

    def aliases_of(self, digest: str) -> list[str]:
        """Aliases that point at a digest, sorted."""
        return sorted(alias for alias, target in self.aliases.items() if target == digest)

    @classmethod
    def fold(cls, name: str, events: Iterable[Event]) -> Catalogue:
        """Replay a name's events; it is called as it was written when it was last published."""
        releases: dict[str, Release] = {}
        aliases: dict[str, str] = {}
        gone: dict[str, Tombstone] = {}
        for event in events:
            digest, version = str(event.digest), str(event.version)
            if event.op == "publish":
                name = event.name
                releases[digest] = Release(version, digest)
                gone.pop(digest, None)
            elif event.op in ("delete", "evict"):
                releases.pop(digest, None)
                gone[digest] = Tombstone(version, digest, event.reason, final=event.op == "delete")
            elif event.op == "alias" and event.alias:
                aliases.pop(event.alias, None)
                if event.digest is not None:
                    aliases[event.alias] = event.digest
            elif digest in releases:
                yanked = (event.reason or "no reason given") if event.op == "yank" else None
                releases[digest] = Release(releases[digest].version, digest, yanked)
        return cls(name, in_order(releases.values()), aliases, in_order(gone.values()))


EntryT = TypeVar("EntryT", Release, Tombstone)


def in_order(entries: Iterable[EntryT]) -> tuple[EntryT, ...]:
    """Releases, or tombstones, by version."""
    return tuple(sorted(entries, key=lambda entry: version_key(entry.version)))


def choose(ref: AdapterRef, catalogue: Catalogue, *, where: str = "the store") -> Release:
    """Pick the one release a ref stands for.

    Raises
    ------
    NotFound
        Saying what there is instead: known versions, close aliases, or that all that fits is yanked.
    """
    if not catalogue.releases:
        raise NotFound(f"there is no adapter {ref.id} in {where}", ref=ref)
    if ref.alias is not None and ref.alias != LATEST:
        release = catalogue.find(digest=catalogue.aliases.get(ref.alias))
        if release is None:
            hint = suggest(ref.alias, catalogue.aliases) or _versions_hint(catalogue)
            raise NotFound(f"{ref.id} has no alias {ref.alias!r} in {where}", ref=ref, hint=hint)
        return release
    if ref.version is not None or ref.digest is not None:
        release = catalogue.find(version=ref.version, digest=ref.digest)
        if release is None:
            gone = catalogue.tombstone(ref.version)
            why = f": it was {_buried(gone)}" if gone is not None else ""
            raise NotFound(f"{ref} is not in {where}{why}", ref=ref, digest=ref.digest, hint=_versions_hint(catalogue))
        return release
    return _highest(ref, catalogue, where)


def refuse_conflict(ref: AdapterRef, digest: str, catalogue: Catalogue, *, where: str) -> bool:
    """Whether this very artifact is in a catalogue; Conflict when another one has, or had, its name and version."""
    present = catalogue.find(version=ref.version)
    gone = catalogue.tombstone(ref.version)
    if gone is not None and (gone.final or gone.digest != digest):
        raise Conflict(
            f"{ref} was {_buried(gone)} in {where}; a version is never used again",
            ref=ref,
            digest=gone.digest,
            hint="give it a new version",
        )
    if present is None:
        return False
    if present.digest == digest:
        return True
    raise Conflict(
        f"{ref} is published in {where} with other content ({present.digest[:19]}..., this one is "
        f"{digest[:19]}...); versions are immutable",
        ref=ref,
        digest=present.digest,
        hint="give it a new version",
    )


def refuse_moved(catalogue: Catalogue, alias: str, expect: str | None) -> None:
    """Refuse by Conflict where an alias does not stand at a version, a digest, or nowhere (`ABSENT`); None is any."""
    if expect is None:
        return
    before = catalogue.aliases.get(alias)
    if expect == ABSENT:
        wanted = None
    else:
        release = catalogue.find(digest=expect) if expect.startswith("sha256:") else catalogue.find(version=expect)
        wanted = release.digest if release else expect
    if before != wanted:
        now = catalogue.find(digest=before) if before else None
        raise Conflict(
            f"alias {alias!r} of {catalogue.name} stands at {now.version if now else 'nothing'}, not at {expect}",
            ref=f"{catalogue.name}@{alias}",
            digest=before,
            hint="someone moved it; look again, then decide",
        )


def refuse_aliased(catalogue: Catalogue, release: Release, *, where: str) -> None:
    """Refuse by Conflict to delete a release that an alias stands for."""
    if aliases := catalogue.aliases_of(release.digest):
        name = catalogue.name
        raise Conflict(
            f"{name}@{release.version} is what {', '.join('@' + alias for alias in aliases)} stands for in {where}",
            ref=f"{name}@{release.version}",
            digest=release.digest,
            hint=f"move it first: hub tag {name}@OTHER {aliases[0]}, or hub untag {name}@{aliases[0]}; what was tagged "
            f"moves at a remote by hub push {name}@{aliases[0]} --to REMOTE",
        )


def _buried(gone: Tombstone) -> str:
    how = "deleted" if gone.final else f"evicted ({gone.digest[:19]}... may come back)"
    return f"{how} ({gone.reason})" if gone.reason else how


def _highest(ref: AdapterRef, catalogue: Catalogue, where: str) -> Release:
    from packaging.specifiers import SpecifierSet

    by_version = {release.version: release for release in catalogue.releases}
    fitting = list(SpecifierSet(ref.range or "").filter(by_version))
    live = list(SpecifierSet(ref.range or "").filter(v for v in by_version if by_version[v].yanked is None))
    if live:
        return by_version[live[-1]]  # releases are in version order, and filter keeps it
    if fitting:
        release = by_version[fitting[-1]]
        raise NotFound(
            f"every version that fits {ref} is yanked in {where} ({release.version}: {release.yanked})",
            ref=ref,
            hint=f"pin it exactly to use it all the same: {ref.id}@{release.version}",
        )
    raise NotFound(f"no version of {ref.id} in {where} fits {ref.range}", ref=ref, hint=_versions_hint(catalogue))


def _versions_hint(catalogue: Catalogue) -> str:
    versions = [release.version for release in catalogue.releases][-8:]
    aliases = [f"@{alias}" for alias in sorted(catalogue.aliases)][:4]
    return f"there {'is' if len(versions) == 1 else 'are'} {', '.join(versions + aliases)}"
