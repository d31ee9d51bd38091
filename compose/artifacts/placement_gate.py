"""The gate that needs a model: every tensor of an adapter must find its place on the base it says it is for.

The base is built without weights from its config, where that is on this machine; nothing is downloaded for it.
"""

from __future__ import annotations

from pathlib import Path

from compose.base.at_hand import config_at_hand
from hub.errors import GateError, HubError
from hub.manifest import Manifest

__all__ = ["gate"]

_UNTRIED = "give its base (--base DIR, or hf download it), or publish it untried: --no-trial"


def gate(directory: Path, manifest: Manifest) -> tuple[str, ...]:
    """Try an adapter directory on the shapes of its base; see `hub.gate.Gate`.

    Raises
    ------
    GateError
        A kind, a field or a tensor that the base has no place for, by name; or the trial cannot be made, and why.
    """
    if manifest.type not in ("adapter", "merge"):
        return ()
    if manifest.base is None:
        raise _untried(manifest, "its manifest does not say which base it is for")
    where = config_at_hand(manifest.base)
    if where is None:
        raise _untried(manifest, f"its base {manifest.base.repo} is not on this machine, as far as is known here")
    from compose.inspection.fake_base import FakeBase  # torch comes with it
    from compose.planning.members import StoredAdapter

    try:
        task = manifest.head_task
        outline = FakeBase(where.directory, task=task, labels=(manifest.labels or None) if task else None)
    except HubError as error:
        raise _untried(manifest, f"its base {manifest.base.repo} cannot be built here ({error.message})") from error
    try:
        outline.put(manifest.name, StoredAdapter(str(manifest.ref), manifest, directory, manifest))
    except HubError as error:
        raise GateError(
            f"{manifest.base.repo} has no place for {manifest.ref}: {error.message}",
            ref=manifest.ref,
            hint=error.hint or "give its true --base",
        ) from error
    return ()


def _untried(manifest: Manifest, why: str) -> GateError:
    return GateError(
        f"whether every tensor of {manifest.ref} has its place cannot be tried: {why}", ref=manifest.ref, hint=_UNTRIED
    )
