"""The gate that needs a model: every tensor of an adapter must find its place on the base it says it is for.

The base is built without weights from its config, where that is on this machine; nothing is downloaded for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from compose.base.fingerprint import config_digest
from compose.base.location import Location, locate
from hub.errors import GateError, HubError
from hub.manifest import BaseIdentity, Manifest

__all__ = ["gate"]


def gate(directory: Path, manifest: Manifest) -> Iterable[str]:
    """Try an adapter directory on the shapes of its base; see `hub.contents.checks.Gate`.

    Raises
    ------
    GateError
        A kind, a field or a tensor that the base has no place for, by name.
    """
    where = _at_hand(manifest.base) if manifest.type in ("adapter", "merge") and manifest.base else None
    if where is None:
        return ()
    from compose.inspection.fake_base import Outline  # torch comes with it
    from compose.planning.members import Held

    try:
        outline = Outline(where.directory, task=manifest.task, labels=manifest.labels or None)
    except HubError:  # a base that this version of transformers does not know: nothing can be said
        return ()
    try:
        outline.put(manifest.name, Held(str(manifest.ref), manifest, directory, manifest))
    except HubError as error:
        name = f"{manifest.base.repo} has no place for {manifest.ref}" if manifest.base else str(manifest.ref)
        raise GateError(
            f"{name}: {error.message}", ref=manifest.ref, hint=error.hint or "give its true --base"
        ) from error
    return ()


def _at_hand(base: BaseIdentity) -> Location | None:
    """Where the config of a base is on this machine; None where it is not, or is another one's."""
    name = base.repo if base.revision is None or base.repo.startswith("builtin:") else f"{base.repo}@{base.revision}"
    try:
        where = locate(name, offline=True, files=("config.json",))
        return where if config_digest(where.directory) == base.config_digest else None
    except HubError:
        return None
