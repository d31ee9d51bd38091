"""What a composition requires: each artifact by name, range and digest."""

from __future__ import annotations

from collections.abc import Iterable

from packaging.version import Version

from compose.planning.members import Held, Shelf
from hub.errors import UsageError
from hub.manifest import Requirement
from hub.ref import AdapterRef


def requirements(refs: Iterable[str], shelf: Shelf) -> tuple[Requirement, ...]:
    """What an expression over ``refs`` requires, sorted: each artifact once, by name, range and digest.

    A range in the ref is kept; an exact version or digest allows that version; a bare name or an alias allows what
    is compatible with the version it stands for today (no other major version, which means another base or placement).
    """
    found = {}
    for text in refs:
        held = shelf.find(text)
        if held.manifest is None or held.digest is None:
            raise unpublished(held)
        need = Requirement(name=held.manifest.name, range=_range(shelf, held), digest=held.digest)
        found[need.name, need.digest] = need
    return tuple(found[key] for key in sorted(found))


def _range(shelf: Shelf, held: Held) -> str:
    asked = AdapterRef.parse(str(shelf.given.get(held.text, held.text)))
    version = Version(held.manifest.version if held.manifest else "0")
    if asked.range is not None:
        return asked.range
    if asked.version is not None or asked.digest is not None:
        return f"=={version}"
    return f">={version},<{version.major + 1}"


def unpublished(held: Held) -> UsageError:
    """The error for a member that is a directory."""
    return UsageError(
        f"{held.text} is a directory, and a composition requires published adapters",
        ref=held.text,
        path=held.ref,
        hint=f"hub push {held.ref} --name NS/NAME --version 1.0.0, then write that name; or add --merge",
    )
