"""A foreign adapter becomes an artifact: it is found, read onto its base by compose, packed and put into the store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.errors import UsageError
from hub.foreign import sources
from hub.foreign.peft_config import facts_of
from hub.lazy import load
from hub.manifest import Draft, Lineage, validate
from hub.pack import pack

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact
    from hub.store import Store

_CONVERT = "compose.artifacts.importing:convert"
_IDENTITY = "compose.base.model:identity_of"
_RECORD = "compose.artifacts.probes:record_directory"
_OF_THE_BASE = ("base_model_name_or_path", "revision")  # a path of somebody's machine, often; the manifest knows better


def take_in(
    store: Store,
    source: str,
    facts: Mapping[str, Any],
    *,
    subfolder: str | None = None,
    probe: bool = False,
    say: Callable[[str], None],
) -> Artifact:
    """Publish a foreign adapter; parameters and errors as for `hub.import_`, ``say`` is told what is left out."""
    with tempfile.TemporaryDirectory(prefix="moduloom-import-") as room:
        adapter = sources.find(source, Path(room), subfolder=subfolder)
        stated = _facts(source, adapter, facts)
        if adapter.left:
            say(f"left out: {', '.join(adapter.left[:8])}{', ...' if len(adapter.left) > 8 else ''}")
        return _publish(store, adapter, stated, probe)


def _facts(source: str, adapter: sources.ForeignAdapter, given: Mapping[str, Any]) -> dict[str, Any]:
    """Facts given and facts of the config; what is missing is asked for, never invented."""
    facts = {**facts_of(adapter.directory), **given}
    missing = [f"--{name}" for name in ("name", "version", "base") if name not in facts]
    if not missing:
        return facts
    stated = facts.get("hyperparameters", {})
    base, revision = stated.get("base_model_name_or_path"), stated.get("revision")
    hint = f"write hub import {source} {' '.join(f'{flag} ...' for flag in missing)}"
    if "--base" in missing and base:
        hint += f"; its config names the base {base}{f'@{revision}' if revision else ', of no stated revision'}"
    raise UsageError(f"these facts of {source} are missing: {', '.join(missing)}", hint=hint)


def _publish(store: Store, source: sources.ForeignAdapter, facts: dict[str, Any], probe: bool) -> Artifact:
    base, task, labels = facts.pop("base"), facts.get("task"), facts.get("labels", ())
    stated = facts.get("hyperparameters", {})
    facts["hyperparameters"] = {name: value for name, value in stated.items() if name not in _OF_THE_BASE}
    facts.pop("kind", None)
    draft = validate(Draft, {**facts, "kind": "unknown"}, what="the facts")  # refused before anything is read
    with tempfile.TemporaryDirectory(prefix="moduloom-import-") as place:
        out = Path(place) / "artifact"
        out.mkdir()
        adapter = load(_CONVERT)(source.directory, out, base=base, task=task, labels=labels)
        if probe:
            load(_RECORD)(out, base=base, task=task, labels=labels)
        measured = {
            "kind": adapter.kind,
            "placement": tuple(adapter.paths),
            "base": load(_IDENTITY)(base),
            "lineage": Lineage(run=source.origin) if source.origin else None,
        }
        pack(out, validate(Draft, {**draft.model_dump(exclude={"base"}), **measured}, what="the facts"))
        return store.put(out)
