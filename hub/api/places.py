"""What the functions of `hub.api` share: places by name or URL, progress, sentences and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from hub.errors import HubWarning

if TYPE_CHECKING:
    from hub.console.progress import Progress
    from hub.remotes.base import Remote
    from hub.storage.artifact import Artifact
    from hub.storage.releases import Release

Say: TypeAlias = Callable[[str], None]


def silent(_text: str) -> None:
    """Say nothing."""


def open_place(place: str | None) -> Remote | None:
    """Remote of a name, a URL or a path; None where there is none."""
    if place is None:
        return None
    from hub.project.named_remotes import Remotes

    return Remotes().open(place)


def find_at(place: str, ref: str) -> tuple[Remote, Release]:
    """A remote, and what a ref stands for there."""
    from hub.project.named_remotes import Remotes
    from hub.ref import AdapterRef
    from hub.transfer import find

    remote = Remotes().open(place)
    return remote, find(remote, AdapterRef.parse(ref))


def moving(progress: Progress | None, jobs: int | None) -> dict[str, Any]:
    """How `hub.transfer` moves bytes: whom it tells, and how many files at once."""
    from hub.console.progress import quiet
    from hub.io.parallel import JOBS

    return {"progress": progress or quiet, "jobs": jobs or JOBS}


def warn_of(artifact: Artifact) -> None:
    """Say the warnings that the gates wrote into a manifest."""
    for warning in artifact.manifest.warnings:
        warn(f"{artifact.ref}: {warning}")


def warn(text: str) -> None:
    """Say what must not be missed: the ``hub`` command prints it, Python shows it as it shows warnings."""
    warnings.warn(text, HubWarning, stacklevel=4)
