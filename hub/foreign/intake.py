"""A foreign adapter becomes an artifact: it is found, read onto its base by compose, packed and put into the store."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.errors import GateError, NotFound, UsageError, hinted
from hub.foreign import sources
from hub.foreign.peft_config import facts_of, names_other_base
from hub.lazy import load
from hub.manifest import Draft, Lineage, validate
from hub.pack import pack
from hub.store import Store

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact

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
        other = names_other_base(adapter.directory, str(stated["base"]))
        if other is not None:
            say(f"the config of {source} names the base {other}, and not {stated['base']}")
        with hinted(f"nothing of {source} was changed: mend what is named there, then import it again", GateError):
            return _publish(store, adapter, stated, probe)


def take_in_each(
    store: Store, source: str, facts: Mapping[str, Any], *, probe: bool = False, say: Callable[[str], None]
) -> list[Artifact]:
    """Publish every adapter of a source, each under the given name and that of its folder: ``acme/tone-french``.

    All facts are checked, and every adapter is read, before the first one is published.
    """
    folders = sources.folders(source)
    if not folders:
        raise NotFound(f"{source} holds no adapter", path=source, hint="check the path")
    if "name" not in facts:
        raise UsageError("--each needs a name that the folders' names are put behind", hint="add --name NS/NAME")
    with tempfile.TemporaryDirectory(prefix="moduloom-import-") as room:
        stores = Store(Path(room) / "store")  # where they are tried: all or none
        named = {folder: {**facts, "name": _name_in(str(facts["name"]), folder)} for folder in folders}
        for folder, own in named.items():
            take_in(stores, source, own, subfolder=folder, probe=probe, say=say)
        return [store.put(stores.get(own["name"]).materialize(Path(room) / folder)) for folder, own in named.items()]


def _name_in(name: str, folder: str) -> str:
    own = re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-")
    return f"{name}-{own}" if own else name


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
        for name in source.tokenizer:
            shutil.copyfile(source.directory / name, out / name)
        pack(out, validate(Draft, {**draft.model_dump(exclude={"base"}), **measured}, what="the facts"))
        return store.put(out)
