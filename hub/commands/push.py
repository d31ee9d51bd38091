"""``hub push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from hub.commands._options import jobs_option
from hub.commands._output import json_option, print_json, say, summary, warn

if TYPE_CHECKING:
    from hub.manifest import Draft, Manifest
    from hub.relations.next_version import Level
    from hub.remotes import Remote
    from hub.storage.artifact import Artifact
    from hub.store import Store


@click.command()
@click.argument("target", metavar="DIR|REF")
@click.option("--to", "place", metavar="REMOTE", help="Send it there: a name (`hub remote`), a URL or a path.")
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
@click.option(
    "--bump",
    type=click.Choice(["auto", "major", "minor", "patch"]),
    help="The next version: computed from what changed (auto), or raised by this much. Implies --repack.",
)
@click.option("--tag", "alias", help="Let this alias stand for it.")
@click.option("--requires/--no-requires", default=True, help="Send what it requires as well (the default).")
@jobs_option
@json_option
def push(
    target: str,
    place: str | None,
    type_: str | None,
    license_: str | None,
    summary_: str | None,
    repack: bool,
    bump: str | None,
    alias: str | None,
    requires: bool,
    jobs: int,
    as_json: bool,
    **facts: Any,
) -> None:
    """Publish a directory into the store, or send an artifact to a remote.

    \b
    hub push ./tone                                     (module.json is there)
    hub push ./peft --name acme/tone --version 1.0.0 --base builtin:tiny-lm
    hub push ./tone --bump auto --to team               (the next version, to a named remote)
    hub push acme/tone@1.0.0 --to s3://bucket/adapters  (from the store to a remote)

    A directory is checked first: no pickles, no links, no NaN, all tensors as its manifest says. Versions are
    immutable: the same content again is a no-op, other content under a published version is refused.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.store import Store

    facts |= {"type": type_, "license": license_, "summary": summary_}
    given = {name: value for name, value in facts.items() if value}
    store = Store()
    remote = _open(place)
    directory = Path(target).expanduser()
    if directory.is_dir():
        artifact = _bumped(store, remote, directory, given, bump) if bump else _publish(store, directory, given, repack)
    else:
        artifact = _published(store, target, remote is not None or alias is not None, bool(given or repack or bump))
    for warning in artifact.manifest.warnings:
        warn(f"{artifact.ref}: {warning}")
    ref = str(artifact.ref) if directory.is_dir() else target
    if alias is not None:
        ref = f"{artifact.ref.id}@{alias}"
        artifact = store.tag(artifact.ref, alias)
    if remote is not None:
        from hub.console.progress import bars
        from hub.transfer import push as transfer

        with bars() as progress:
            transfer(store, remote, ref, progress=progress, requires=requires, jobs=jobs)
    if as_json:
        print_json({**summary(artifact), "to": place})
    else:
        say(f"{artifact.ref} ({artifact.digest[:19]}...) is in {remote.url if remote else store.where}")


def _open(place: str | None) -> Remote | None:
    if place is None:
        return None
    from hub.project.named_remotes import Remotes

    return Remotes().open(place)


def _published(store: Store, target: str, something_to_do: bool, facts: bool) -> Artifact:
    from hub.errors import NotFound, UsageError

    looks_like_path = target.startswith((".", "/", "~")) or target.endswith("/")
    if looks_like_path:
        raise NotFound(f"{target} is not a directory", path=target, hint="check the path")
    if facts:
        raise UsageError("facts, --repack and --bump belong to a directory; a published artifact is immutable")
    if not something_to_do:
        artifact = store.get(target)
        raise UsageError(f"{artifact.ref} is published already", hint=f"write hub push {target} --to REMOTE")
    return store.get(target)


def _publish(store: Store, directory: Path, given: dict[str, Any], repack: bool) -> Artifact:
    from hub.errors import UsageError
    from hub.gate import run_gates
    from hub.manifest import MANIFEST_NAME, read_manifest
    from hub.pack import pack

    if not (directory / MANIFEST_NAME).exists():
        pack(directory, _draft(directory, given), on_base=True)
    elif repack:
        pack(directory, _draft_again(directory, given), on_base=True)
    elif given:
        raise UsageError(
            f"{directory} has a {MANIFEST_NAME}, which states its facts",
            hint="add --repack to change them",
        )
    else:
        manifest = read_manifest(directory)
        for warning in run_gates(directory, manifest, on_base=True):
            warn(f"{manifest.ref}: {warning}")
    return store.put(directory)


def _bumped(store: Store, remote: Remote | None, directory: Path, given: dict[str, Any], bump: str) -> Artifact:
    """Publish a directory under the version that follows from what changed since the last one, here or there."""
    from hub.errors import UsageError
    from hub.manifest import MANIFEST_NAME
    from hub.pack import measure, pack
    from hub.relations.next_version import FIRST, Change, compare, highest, raised
    from hub.transfer import last_manifest

    if "version" in given:
        raise UsageError("give either --version or --bump")
    given = {**given, "version": FIRST}
    draft = (_draft_again if (directory / MANIFEST_NAME).exists() else _draft)(directory, given)
    catalogues = [store.catalogue(draft.name)] + ([remote.catalogue(draft.name)] if remote else [])
    before = last_manifest(store, remote, draft.name, catalogues)
    top = highest(catalogues)
    if before is not None and top is not None:
        change = compare(before, measure(directory, draft)) if bump == "auto" else Change(cast("Level", bump))
        if change.level is None:
            say(f"nothing changed since {before.ref}")
            return _again(store, remote, before)
        version = raised(top, change.level)
        why = f" ({', '.join(change.reasons)})" if change.reasons else ""
        say(f"{before.ref} -> {version}: {change.level}{why}")
        draft = draft.model_copy(update={"version": version})
    pack(directory, draft, on_base=True)
    return store.put(directory)


def _again(store: Store, remote: Remote | None, manifest: Manifest) -> Artifact:
    from hub.transfer import pull

    if remote is not None and store.catalogue(manifest.name).find(digest=manifest.digest) is None:
        return pull(store, remote, manifest.ref)
    return store.get(manifest.ref)


def _draft_again(directory: Path, given: dict[str, Any]) -> Draft:
    """Facts of the module.json that is there, those given changed."""
    from hub.manifest import Draft, read_manifest, validate

    before = read_manifest(directory).draft().model_dump()
    return validate(Draft, {**before, **_facts(given)}, what="the facts")


def _draft(directory: Path, given: dict[str, Any]) -> Draft:
    """Facts by flags and by the PEFT config; what is missing is asked for, never invented."""
    from hub.errors import UsageError
    from hub.foreign.peft_config import facts_of, without_paths
    from hub.manifest import Draft, validate

    found = {**facts_of(directory), **_facts(given)}
    type_ = found.get("type", "adapter")
    needed = ["name", "version"] + ["kind"] * (type_ == "adapter") + ["base"] * (type_ in ("adapter", "merge"))
    missing = [f"--{name}" for name in needed if name not in found]
    if missing:
        raise UsageError(
            f"{directory} has no module.json, and these facts are missing: {', '.join(missing)}",
            hint=f"write hub push {directory} {' '.join(f'{flag} ...' for flag in missing)}",
        )
    draft = validate(Draft, found, what="the facts")
    plain = without_paths(draft.hyperparameters, directory, draft.base.repo if draft.base else None)
    return draft.model_copy(update={"hyperparameters": plain})


def _facts(given: dict[str, Any]) -> dict[str, Any]:
    facts = dict(given)
    if "base" in facts:
        facts["base"] = _identity(facts["base"])
    return facts


def _identity(base: str) -> Any:
    """Identity of a base: from a JSON file, or measured by the package that knows models."""
    from hub.io.canonical_json import MAX_JSON, loads
    from hub.io.files import read_capped
    from hub.lazy import load
    from hub.manifest import BaseIdentity, validate

    if base.endswith(".json"):
        path = Path(base).expanduser()
        return validate(BaseIdentity, loads(read_capped(path, MAX_JSON), what=base), what=base)
    return load("compose.base.model:identity")(base)
