"""What a composition requires: each artifact by name, range and digest."""

from __future__ import annotations

from collections.abc import Iterable

from packaging.version import Version

from compose.planning.members import AdapterFinder, StoredAdapter
from hub.errors import UsageError
from hub.manifest import Requirement
from hub.ref import AdapterRef


def requirements(refs: Iterable[str], finder: AdapterFinder) -> tuple[Requirement, ...]:
    """What an expression over ``refs`` requires, sorted: each artifact once, by name, range and digest.

    A range in the ref is kept; an exact version or digest allows that version; a bare name or an alias allows what
    is compatible with the version it stands for today (no other major version, which means another base or placement).
    """
    needs = {}
    for text in refs:
        stored = finder.find(text)
        if stored.manifest is None or stored.digest is None:
            raise unpublished(stored)
        need = Requirement(name=stored.manifest.name, range=_range(finder, stored), digest=stored.digest)
        needs[need.name, need.digest] = need
    return tuple(needs[key] for key in sorted(needs))


def _range(finder: AdapterFinder, stored: StoredAdapter) -> str:
    asked = AdapterRef.parse(str(finder.given.get(stored.text, stored.text)))
    version = Version(stored.manifest.version if stored.manifest else "0")
    if asked.range is not None:
        return asked.range
    if asked.version is not None or asked.digest is not None:
        return f"=={version}"
    return f">={version},<{version.major + 1}"


def unpublished(stored: StoredAdapter) -> UsageError:
    """The error for a member that is a directory."""
    return UsageError(
        f"{stored.text} is a directory, and a composition requires published adapters",
        ref=stored.text,
        path=stored.ref,
        hint=f"hub push {stored.ref} --name NS/NAME --version 1.0.0, then write that name; or add --merge",
    )
