"""``hub push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import json_option, print_json, say, summary, warn

if TYPE_CHECKING:
    from hub.artifact import Artifact
    from hub.manifest import Draft
    from hub.store import Store


@click.command()
@click.argument("target", metavar="DIR|REF")
@click.option("--to", "remote", metavar="URL|PATH", help="Send it to this remote.")
@click.option("--name", metavar="NS/NAME", help="Fact: the name.")
@click.option("--version", help="Fact: the version (PEP 440).")
@click.option("--type", "type_", help="Fact: adapter (the default), composition, router or merge.")
@click.option("--kind", help="Fact: the kind; read from a PEFT config where that tells.")
@click.option("--method", help="Fact: how it was learned.")
@click.option("--base", help="Fact: the base (builtin:..., a directory, an id), or a .json file with its identity.")
@click.option("--task", help="Fact: the task.")
@click.option("--label", "labels", multiple=True, help="Fact: a label, in order (repeat it).")
@click.option("--language", "languages", multiple=True, help="Fact: a language (repeat it).")
@click.option("--domain", "domains", multiple=True, help="Fact: a domain (repeat it).")
@click.option("--license", "license_", help="Fact: the licence (SPDX).")
@click.option("--summary", "summary_", help="Fact: one sentence.")
@click.option("--repack", is_flag=True, help="Measure the files again, keeping the facts of module.json.")
@click.option("--tag", "alias", help="Let this alias stand for it.")
@click.option("--requires/--no-requires", default=True, help="Send what it requires as well (the default).")
@json_option
def push(
    target: str,
    remote: str | None,
    type_: str | None,
    license_: str | None,
    summary_: str | None,
    repack: bool,
    alias: str | None,
    requires: bool,
    as_json: bool,
    **facts: Any,
) -> None:
    """Publish a directory into the store, or send an artifact to a remote.

    \b
    hub push ./tone                                     (module.json is there)
    hub push ./peft --name acme/tone --version 1.0.0 --base builtin:tiny-lm
    hub push acme/tone@1.0.0 --to /mnt/share/adapters   (from the store to a remote)

    A directory is checked first: no pickles, no links, no NaN, all tensors as its manifest says. Versions are
    immutable: the same content again is a no-op, other content under a published version is refused.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.store import Store

    facts |= {"type": type_, "license": license_, "summary": summary_}
    given = {name: value for name, value in facts.items() if value}
    store = Store()
    directory = Path(target).expanduser()
    if directory.is_dir():
        artifact = _publish(store, directory, given, repack)
    else:
        artifact = _published(store, target, remote, alias, bool(given) or repack)
    for warning in artifact.manifest.warnings:
        warn(f"{artifact.ref}: {warning}")
    ref = str(artifact.ref) if directory.is_dir() else target
    if alias is not None:
        ref = f"{artifact.ref.id}@{alias}"
        artifact = store.tag(artifact.ref, alias)
    if remote is not None:
        from hub.progress import bars
        from hub.remotes import from_url
        from hub.transfer import push as transfer

        with bars() as progress:
            transfer(store, from_url(remote), ref, progress=progress, requires=requires)
    if as_json:
        print_json({**summary(artifact), "to": remote})
    else:
        say(f"{artifact.ref} ({artifact.digest[:19]}...) is in {remote or store.where}")


def _published(store: Store, target: str, remote: str | None, alias: str | None, facts: bool) -> Artifact:
    from hub.errors import NotFound, UsageError

    looks_like_path = target.startswith((".", "/", "~")) or target.endswith("/")
    if looks_like_path:
        raise NotFound(f"{target} is not a directory", path=target, hint="check the path")
    if facts:
        raise UsageError("facts and --repack belong to a directory; a published artifact is immutable")
    if remote is None and alias is None:
        artifact = store.get(target)
        raise UsageError(f"{artifact.ref} is published already", hint=f"write hub push {target} --to URL|PATH")
    return store.get(target)


def _publish(store: Store, directory: Path, given: dict[str, Any], repack: bool) -> Artifact:
    from hub.errors import UsageError
    from hub.manifest import MANIFEST_NAME, read_manifest
    from hub.pack import pack

    if not (directory / MANIFEST_NAME).exists():
        pack(directory, _draft(directory, given))
    elif repack:
        from hub.manifest import Draft, validate

        before = read_manifest(directory).draft().model_dump()
        pack(directory, validate(Draft, {**before, **_facts(given)}, what="the facts"))
    elif given:
        raise UsageError(
            f"{directory} has a {MANIFEST_NAME}, which states its facts",
            hint="add --repack to change them",
        )
    return store.put(directory)


def _draft(directory: Path, given: dict[str, Any]) -> Draft:
    """Facts by flags and by the PEFT config; what is missing is asked for, never invented."""
    from hub.errors import UsageError
    from hub.manifest import Draft, validate
    from hub.peft_config import facts_of

    found = {**facts_of(directory), **_facts(given)}
    type_ = found.get("type", "adapter")
    needed = ["name", "version"] + ["kind"] * (type_ == "adapter") + ["base"] * (type_ in ("adapter", "merge"))
    missing = [f"--{name}" for name in needed if name not in found]
    if missing:
        raise UsageError(
            f"{directory} has no module.json, and these facts are missing: {', '.join(missing)}",
            hint=f"write hub push {directory} {' '.join(f'{flag} ...' for flag in missing)}",
        )
    return validate(Draft, found, what="the facts")


def _facts(given: dict[str, Any]) -> dict[str, Any]:
    facts = dict(given)
    if "base" in facts:
        facts["base"] = _identity(facts["base"])
    return facts


def _identity(base: str) -> Any:
    """Identity of a base: from a JSON file, or measured by the package that knows models."""
    from hub.canonical import MAX_JSON, loads
    from hub.files import read_capped
    from hub.lazy import load
    from hub.manifest import BaseIdentity, validate

    if base.endswith(".json"):
        path = Path(base).expanduser()
        return validate(BaseIdentity, loads(read_capped(path, MAX_JSON), what=base), what=base)
    return load("compose.base:identity")(base)
