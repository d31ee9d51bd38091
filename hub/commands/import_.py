"""``hub import``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import json_option, print_json, say, summary, warn

if TYPE_CHECKING:
    from hub.foreign.sources import Found
    from hub.storage.artifact import Artifact
    from hub.store import Store

_CONVERT = "compose.artifacts.importing:convert"
_IDENTITY = "compose.base.model:identity"
_OF_THE_BASE = ("base_model_name_or_path", "revision")  # a path of somebody's machine, often; the manifest knows better
_RECORD = "compose.artifacts.probes:record_directory"


@click.command("import")
@click.argument("source", metavar="DIR|hf://OWNER/NAME[@REV]")
@click.option("--name", metavar="NS/NAME", help="Fact: the name.")
@click.option("--version", help="Fact: the version (PEP 440).")
@click.option("--base", help="Fact: the base it was made for (builtin:..., a directory, an id).")
@click.option("--task", help="Fact: the task [as its config says].")
@click.option("--label", "labels", multiple=True, help="Fact: a class, in order (repeat it).")
@click.option("--language", "languages", multiple=True, help="Fact: a language (repeat it).")
@click.option("--domain", "domains", multiple=True, help="Fact: a domain (repeat it).")
@click.option("--license", "license", help="Fact: the licence (SPDX).")
@click.option("--summary", help="Fact: one sentence.")
@click.option("--subfolder", help="Which one, where the source holds several adapters.")
@click.option("--probe", is_flag=True, help="Run it on the base and record what it does, for `hub verify --run`.")
@click.option("--tag", "alias", help="Let this alias stand for it.")
@json_option
def import_(source: str, subfolder: str | None, probe: bool, alias: str | None, as_json: bool, **facts: Any) -> None:
    """Bring a foreign adapter, such as one that PEFT has saved, into the store.

    \b
    hub import ./peft --name acme/tone --version 1.0.0 --base builtin:tiny-lm
    hub import hf://owner/name@main --name acme/tone --version 1.0.0 --base org/model

    It is read onto the shapes of the base: a type, a field or a tensor that has no place there is refused by name. The
    source is not changed. Pickles are never read. What the files do not say is asked for, not guessed.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.foreign import sources
    from hub.store import Store

    store = Store()
    with tempfile.TemporaryDirectory(prefix="moduloom-import-") as room:
        found = sources.find(source, Path(room), subfolder=subfolder)
        given = _facts(source, found, {name: value for name, value in facts.items() if value})
        if found.left:
            say(f"left out: {', '.join(found.left[:8])}{', ...' if len(found.left) > 8 else ''}")
        artifact = _publish(store, found, given, probe)
    if alias is not None:
        artifact = store.tag(artifact.ref, alias)
    for warning in artifact.manifest.warnings:
        warn(f"{artifact.ref}: {warning}")
    if as_json:
        print_json({**summary(artifact), "origin": found.origin})
    else:
        say(f"{artifact.ref} ({artifact.digest[:19]}...) is in {store.where}")


def _facts(source: str, found: Found, given: dict[str, Any]) -> dict[str, Any]:
    """Facts by flags and by the config; what is missing is asked for, never invented."""
    from hub.errors import UsageError
    from hub.foreign.peft_config import facts_of

    facts = {**facts_of(found.directory), **given}
    missing = [f"--{name}" for name in ("name", "version", "base") if name not in facts]
    if not missing:
        return facts
    stated = facts.get("hyperparameters", {})
    base, revision = stated.get("base_model_name_or_path"), stated.get("revision")
    hint = f"write hub import {source} {' '.join(f'{flag} ...' for flag in missing)}"
    if "--base" in missing and base:
        hint += f"; its config names the base {base}{f'@{revision}' if revision else ', of no stated revision'}"
    raise UsageError(f"these facts of {source} are missing: {', '.join(missing)}", hint=hint)


def _publish(store: Store, found: Found, facts: dict[str, Any], probe: bool) -> Artifact:
    from hub.lazy import load
    from hub.manifest import Draft, Lineage, validate
    from hub.pack import pack

    base, task, labels = facts.pop("base"), facts.get("task"), facts.get("labels", ())
    stated = facts.get("hyperparameters", {})
    facts["hyperparameters"] = {name: value for name, value in stated.items() if name not in _OF_THE_BASE}
    facts.pop("kind", None)
    draft = validate(Draft, {**facts, "kind": "unknown"}, what="the facts")  # refused before anything is read
    with tempfile.TemporaryDirectory(prefix="moduloom-import-") as place:
        out = Path(place) / "artifact"
        out.mkdir()
        adapter = load(_CONVERT)(found.directory, out, base=base, task=task, labels=labels)
        if probe:
            load(_RECORD)(out, base=base, task=task, labels=labels)
        told = {
            "kind": adapter.kind,
            "placement": tuple(adapter.paths),
            "base": load(_IDENTITY)(base),
            "lineage": Lineage(run=found.origin) if found.origin else None,
        }
        pack(out, validate(Draft, {**draft.model_dump(exclude={"base"}), **told}, what="the facts"))
        return store.put(out)
