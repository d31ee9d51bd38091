"""A directory becomes a published artifact: its facts are gathered, its version is found, it is packed and stored."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hub.api.places import Say, silent, warn
from hub.errors import GateError, UsageError, hinted
from hub.foreign.peft_config import facts_of, names_other_base, without_paths
from hub.foreign.sources import find
from hub.gate import run_gates
from hub.manifest import MANIFEST_NAME, Draft, read_manifest, validate
from hub.pack import measure, pack
from hub.project.pushed_folders import PushedFolders
from hub.ref import name_key
from hub.relations.next_version import FIRST, Change, compare, highest, raised
from hub.transfer import last_manifest, pull

if TYPE_CHECKING:
    from hub.manifest import Manifest
    from hub.relations.next_version import Level
    from hub.remotes.base import Remote
    from hub.storage.artifact import Artifact
    from hub.store import Store


def publish(
    store: Store,
    directory: Path,
    facts: Mapping[str, Any],
    *,
    repack: bool = False,
    trial: bool = True,
    say: Say = silent,
) -> Artifact:
    """Publish a directory; without ``module.json`` from ``facts`` and what its config says.

    Parameters
    ----------
    facts
        Fields of `hub.manifest.Draft`; ``base`` may also be what `hub.push` takes.
    repack
        Measure the files again, keeping the facts of ``module.json`` that ``facts`` do not change.
    trial
        Whether the gates that need the base run: they refuse where it is not on this machine.
    say
        Told which files of a foreign directory are left out.

    Raises
    ------
    UsageError
        A fact is missing; or other facts than those that ``module.json`` states, without ``repack``.
    GateError, IntegrityError, Conflict
        What must not be published, or could not be tried; a version that exists with other content.
    """
    if not (directory / MANIFEST_NAME).exists():
        return _publish_folder(
            store, directory, _draft(directory, _said_before(store, directory, facts, say)), trial, say
        )
    if repack:
        return _publish_folder(store, directory, _draft_again(directory, facts), trial, say)
    manifest = read_manifest(directory)
    _refuse_other_facts(directory, manifest, _with_identity(facts))
    with hinted(f"mend what is named, then: hub push {directory} --repack --version NEW", GateError):
        for warning in run_gates(directory, manifest, on_base=trial):
            warn(f"{manifest.ref}: {warning}")
        return store.put(directory)


def _publish_folder(store: Store, directory: Path, draft: Draft, trial: bool, say: Say) -> Artifact:
    """Publish a directory, of which what has no ``module.json`` is found again at its next push."""
    packed = (directory / MANIFEST_NAME).exists()
    hint = f"mend what is named, then: hub push {directory}" + (" --repack --version NEW" if packed else " ...")
    with _files_of(directory, say) as own, hinted(hint, GateError):
        pack(own, draft, on_base=trial)
        artifact = store.put(own)
    if own != directory:
        PushedFolders(store).remember(directory, artifact.ref)
    return artifact


def _said_before(store: Store, directory: Path, facts: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The facts given, and of a folder that was pushed before those of the last time, under the name it had."""
    before = PushedFolders(store).facts(directory)
    if not before or ("name" in facts and name_key(str(facts["name"])) != name_key(str(before["name"]))):
        return dict(facts)
    own = facts_of(directory)
    again = {name: value for name, value in before.items() if name not in facts and name not in own}
    if again:
        say(f"as at the last push of {directory}: {', '.join(_told(name, value) for name, value in again.items())}")
    return {**again, **facts}


def _told(name: str, value: Any) -> str:
    if name == "base":
        return f"base {value.repo}"
    return f"{name} {', '.join(value) if isinstance(value, tuple) else value}"


@contextmanager
def _files_of(directory: Path, say: Say) -> Iterator[Path]:
    """The directory to pack: the one given, or of one that PEFT or a Trainer wrote a copy, so that it stays untouched.

    The copy holds what `hub.import_` takes; what else lies there is left out and named.
    """
    foreign = "peft_type" in facts_of(directory).get("hyperparameters", {})
    if (directory / MANIFEST_NAME).exists() or not foreign:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="moduloom-push-") as room:
        out, parts = Path(room) / "artifact", Path(room) / "parts"
        out.mkdir()
        parts.mkdir()
        adapter = find(str(directory), parts, subfolder=".")
        for path in adapter.directory.iterdir():
            if path.is_file() and path.name not in adapter.left and not path.name.startswith("."):
                shutil.copyfile(path, out / path.name)
        if adapter.left:
            say(f"left out: {', '.join(adapter.left[:8])}{', ...' if len(adapter.left) > 8 else ''}")
        yield out


def _refuse_other_facts(directory: Path, manifest: Manifest, facts: Mapping[str, Any]) -> None:
    """Facts beside a ``module.json`` must be its own; so is the base, given to say where on this machine it is."""
    stated = manifest.draft()
    changed = [name for name, value in facts.items() if getattr(stated, name, None) != value]
    if "base" in changed and stated.base is not None:
        given = facts["base"]
        if (
            given.weights_fingerprint == stated.base.weights_fingerprint
            and given.config_digest == stated.base.config_digest
        ):
            changed.remove("base")  # the same weights under another name
    if changed:
        raise UsageError(
            f"{directory} has a {MANIFEST_NAME}, which states its facts, and not this {' and '.join(changed)}",
            hint="add --repack to change them",
        )


def publish_next(
    store: Store,
    directory: Path,
    facts: Mapping[str, Any],
    *,
    bump: str,
    remote: Remote | None,
    say: Say,
    trial: bool = True,
) -> Artifact:
    """Publish a directory under the version that follows from what changed since the last one, here or at a remote.

    Parameters
    ----------
    bump
        ``auto`` computes from the change what is raised; ``major``, ``minor`` and ``patch`` say it.
    say
        Told which version was chosen, and why.
    trial
        As for `publish`.
    """
    if "version" in facts:
        raise UsageError("give either --version or --bump")
    if (directory / MANIFEST_NAME).exists():
        draft = _draft_again(directory, {**facts, "version": FIRST})
    else:
        draft = _draft(directory, {**_said_before(store, directory, facts, say), "version": FIRST})
    catalogues = [store.catalogue(draft.name)] + ([remote.catalogue(draft.name)] if remote else [])
    before = last_manifest(store, remote, draft.name, catalogues)
    top = highest(catalogues)
    if before is not None and top is not None:
        with _files_of(directory, silent) as own:
            measured = measure(own, draft)
        change = compare(before, measured) if bump == "auto" else Change(cast("Level", bump))
        if change.level is None:
            say(f"nothing changed since {before.ref}")
            return _again(store, remote, before)
        version = raised(top, change.level)
        why = f" ({', '.join(change.reasons)})" if change.reasons else ""
        say(f"{before.ref} -> {version}: {change.level}{why}")
        draft = draft.model_copy(update={"version": version})
    return _publish_folder(store, directory, draft, trial, say)


def _again(store: Store, remote: Remote | None, manifest: Manifest) -> Artifact:
    if remote is not None and store.catalogue(manifest.name).find(digest=manifest.digest) is None:
        return pull(store, remote, manifest.ref)
    return store.get(manifest.ref)


def _draft_again(directory: Path, facts: Mapping[str, Any]) -> Draft:
    """Facts of the module.json that is there, those given changed."""
    before = read_manifest(directory).draft().model_dump()
    return validate(Draft, {**before, **_with_identity(facts)}, what="the facts")


def _draft(directory: Path, facts: Mapping[str, Any]) -> Draft:
    """Facts given and facts of the PEFT config; what is missing is asked for, never invented."""
    stated = {**facts_of(directory), **_with_identity(facts)}
    type_ = stated.get("type", "adapter")
    needed = ["name", "version"] + ["kind"] * (type_ == "adapter") + ["base"] * (type_ in ("adapter", "merge"))
    missing = [f"--{name}" for name in needed if name not in stated]
    if missing:
        raise UsageError(
            f"{directory} has no module.json, and these facts are missing: {', '.join(missing)}",
            hint=f"write hub push {directory} {' '.join(f'{flag} ...' for flag in missing)}",
        )
    named = getattr(facts.get("base"), "repo", facts.get("base"))  # an identity from the last push, or a name
    if isinstance(named, str) and not named.endswith(".json"):
        other = names_other_base(directory, named)
        if other is not None:
            warn(f"the config of {directory} names the base {other}, and not {named}")
    draft = validate(Draft, stated, what="the facts")
    plain = without_paths(draft.hyperparameters, directory, draft.base.repo if draft.base else None)
    return draft.model_copy(update={"hyperparameters": plain})


def _with_identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**facts, "base": _identity(facts["base"])} if "base" in facts else dict(facts)


def _identity(base: Any) -> Any:
    """Identity of a base: given, from a JSON file, or measured by the package that knows models."""
    from hub.io.canonical_json import MAX_JSON, loads
    from hub.io.files import read_capped
    from hub.lazy import load
    from hub.manifest import BaseIdentity

    if isinstance(base, BaseIdentity):
        return base
    if str(base).endswith(".json"):
        path = Path(base).expanduser()
        return validate(BaseIdentity, loads(read_capped(path, MAX_JSON), what=str(base)), what=str(base))
    return load("compose.base.model:identity_of")(base)
