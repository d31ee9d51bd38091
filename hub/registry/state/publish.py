"""Tags: a version publishes a draft through the push gates; any other tag is an alias or a fixed name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub.contents.checks import CONFIG, role_of
from hub.errors import GateError, HubError, IntegrityError, ManifestError
from hub.foreign.peft_config import facts_of, without_paths
from hub.io.disk import disk_errors
from hub.io.files import read_capped
from hub.manifest import MANIFEST_NAME, Draft, FileEntry, Manifest, validate
from hub.pack import pack
from hub.ref import AdapterRef, check_version
from hub.registry.errors import ApiError, from_hub, revision_not_found
from hub.registry.state.changes import check_free
from hub.registry.state.drafts import pairs
from hub.registry.state.front_matter import MAX_CARD, front_matter
from hub.registry.state.git_ids import File
from hub.registry.state.repositories import MAIN, Repos, Revision
from hub.registry.tokens import Caller
from hub.storage.releases import Release

_BOUND = ("config", "weights", "extra")  # files that the facts of a manifest are about


def create_tag(repos: Repos, name: str, tag: str, revision: str, caller: Caller) -> Revision:
    """Give a revision a tag.

    Returns
    -------
    Revision
        What the tag stands for now; for a version, the release.

    Raises
    ------
    ApiError
        409 when the tag exists, or the version is published with other bytes; 400 when a gate refuses.
    """
    target = repos.resolve(name, revision)
    version = _version(name, tag)
    if version is not None:
        published = _publish(repos, target, version, caller)
        canonical = published.release.version if published.release else version
        with repos.drafts.change() as db:
            db.execute("INSERT OR REPLACE INTO version_tags VALUES (?, ?, ?)", (name, canonical, tag))
        return published
    check_free(repos, name, tag)
    if target.release is not None:
        repos.store.tag(AdapterRef.parse(name).at(digest=target.release.digest), tag, expect="absent")
        return target
    if not target.tree:
        raise ApiError(400, f"{name} is empty: upload something, then tag it")
    with repos.drafts.change() as db:
        if db.execute("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", (name, tag, target.oid)).rowcount != 1:
            raise ApiError(409, f"{name} has a tag {tag!r} already")
    return target


def delete_tag(repos: Repos, name: str, tag: str, caller: Caller) -> None:
    """Take a tag away: an alias and a draft's tag are removed, a version is yanked (its bytes stay)."""
    catalogue = repos.catalogue(name)
    version = _version(name, tag)
    release = catalogue.find(version=version) if version is not None else None
    if release is not None and release.yanked is None:
        repos.store.yank(AdapterRef.parse(name).at(version=release.version), f"tag deleted by {caller.name}")
        return
    if tag in catalogue.aliases:
        repos.store.untag(AdapterRef.parse(name), tag)
        return
    with repos.drafts.change() as db:
        if tag not in pairs(db, "tags", name):
            raise revision_not_found(name, tag)
        db.execute("DELETE FROM tags WHERE repo = ? AND name = ?", (name, tag))


def _version(name: str, tag: str) -> str | None:
    """Canonical version that a tag is, or None for an alias; RefError (400) for neither."""
    ref = AdapterRef.parse(f"{name}@{tag}")
    if ref.digest is not None:
        raise ApiError(400, f"{tag[:20]!r} is a digest, not a tag")
    return None if ref.version is None else check_version(ref.version)


def _publish(repos: Repos, target: Revision, version: str, caller: Caller) -> Revision:
    name = target.name
    present = repos.catalogue(name).find(version=version)
    if present is not None:
        return _again(repos, target, present)
    try:
        with disk_errors(repos.drafts.root), repos.drafts.staging.room() as room:
            directory = room / "artifact"
            _lay_out(repos, target, directory)
            manifest = _manifest(repos, target, directory, version)
            repos.store.ingest(manifest, _Linker(directory), reuse=True)
    except (GateError, IntegrityError, ManifestError) as error:
        raise ApiError(400, f"{name} {version} was not published: {from_hub(error).message}") from error
    return _settle(repos, target, manifest, caller)


def _again(repos: Repos, target: Revision, present: Release) -> Revision:
    """Publish a version that is published: takes its yank back, or is a conflict, as tagging twice is everywhere."""
    published = repos.of_release(target.name, present)
    ref = AdapterRef.parse(target.name).at(version=present.version)
    if _files(target) != _files(published):
        raise ApiError(409, f"{ref} is published with other content; versions are immutable: give it a new version")
    if present.yanked is None:
        raise ApiError(409, f"{target.name} has the tag {present.version} already")
    repos.store.yank(ref, None)
    return published


def _files(revision: Revision) -> dict[str, File]:
    return {path: file for path, file in revision.tree.items() if path != MANIFEST_NAME}


def _settle(repos: Repos, target: Revision, manifest: Manifest, caller: Caller) -> Revision:
    release = Release(manifest.version, manifest.digest)
    with repos.drafts.change() as db:
        row = (target.name, manifest.digest, target.oid, caller.name or "anonymous")
        db.execute("INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?)", row)
        # main is the newest version again, unless someone has committed in the meantime
        db.execute("DELETE FROM branches WHERE repo = ? AND name = ? AND oid = ?", (target.name, MAIN, target.oid))
    return repos.of_release(target.name, release)


def _lay_out(repos: Repos, target: Revision, directory: Path) -> None:
    """Make a plain directory of a revision; its files are hard links to the blobs, so this copies nothing."""
    directory.mkdir()
    for path, file in target.tree.items():
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(repos.path(file), place)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


class _Linker:
    """Brings a file of a directory into the store's room."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, entry: FileEntry, target: Path) -> None:
        _link(self._directory / entry.path, target)


def _manifest(repos: Repos, target: Revision, directory: Path, version: str) -> Manifest:
    """Manifest to publish: the author's where it is for this very version, else one packed from what is known."""
    path = directory / MANIFEST_NAME
    if not path.exists():
        return _pack(directory, _draft(target.name, version, directory))
    stated = Manifest.parse(read_capped(path, 16 * 2**20), what=MANIFEST_NAME)
    if stated.ref == AdapterRef.parse(target.name).at(version=version):
        _check_listed(target.tree, stated)
        return stated
    stale = stated.name == target.name and repos.catalogue(target.name).find(digest=stated.digest) is not None
    if not stale:
        raise GateError(
            f"{MANIFEST_NAME} is that of {stated.ref}, which is not the version to publish nor one published here",
            hint=f"tag it {stated.version}, or pack it as {target.name} {version}, or leave {MANIFEST_NAME} out",
        )
    path.unlink()
    if _same_weights(stated, target.tree):
        return _pack(directory, stated.draft().model_copy(update={"version": version}))
    return _pack(directory, _draft(target.name, version, directory))


def _pack(directory: Path, draft: Draft) -> Manifest:
    return pack(directory, draft, gates=(_note_unknown_base,))


def _note_unknown_base(_directory: Path, manifest: Manifest) -> tuple[str, ...]:
    """Gate that records what a plain PEFT directory leaves open."""
    if manifest.base is not None or manifest.type not in ("adapter", "merge"):
        return ()
    named = manifest.hyperparameters.get("base_model_name_or_path")
    stated = f"only names {named!r}, which does not identify weights" if named else "names none"
    return (f"the base is unknown: {CONFIG} {stated}",)


def _check_listed(tree: Mapping[str, File], manifest: Manifest) -> None:
    extra = sorted(tree.keys() - {entry.path for entry in manifest.files} - {MANIFEST_NAME})
    if extra:
        raise GateError(f"{MANIFEST_NAME} does not list {', '.join(extra[:5])}", hint="pack the directory again")
    for entry in manifest.files:
        file = tree.get(entry.path)
        if file is None:
            raise GateError(f"there is no {entry.path}, which {MANIFEST_NAME} lists", hint="upload it too")
        if file != File(entry.sha256, entry.size):
            raise IntegrityError(f"{entry.path} is not the file that {MANIFEST_NAME} lists", hint="pack it again")


def _same_weights(manifest: Manifest, tree: Mapping[str, File]) -> bool:
    """Whether what a manifest says of base and tensors still holds: weights and config have not changed."""
    listed = {entry.path: File(entry.sha256, entry.size) for entry in manifest.files if entry.role in _BOUND}
    return listed == {path: file for path, file in tree.items() if role_of(path) in _BOUND}


def _draft(name: str, version: str, directory: Path) -> Draft:
    """State what a PEFT directory says of itself, and nothing more."""
    facts: dict[str, Any] = {"name": name, "version": version, **facts_of(directory)}
    if not (directory / CONFIG).exists():
        raise GateError(f"there is no {CONFIG}: this is no adapter", hint="versions are for adapters; drafts need none")
    if "kind" not in facts:
        kind = facts["hyperparameters"].get("peft_type")
        raise GateError(f"{CONFIG} has the peft_type {kind!r}, which is not known here", hint="pack it with hub push")
    facts["hyperparameters"] = without_paths(facts["hyperparameters"], None, None)
    facts |= _card_facts(directory)
    return validate(Draft, facts, what=f"the facts of {name} {version}")


def _card_facts(directory: Path) -> dict[str, Any]:
    path = directory / "README.md"
    if not path.exists():
        return {}
    try:
        matter = front_matter(read_capped(path, MAX_CARD).decode("utf-8", "replace"))
    except HubError:  # a card that is too long to search states nothing
        return {}
    facts: dict[str, Any] = {}
    if isinstance(licence := matter.get("license"), str) and 0 < len(licence) <= 64:
        facts["license"] = licence
    languages = matter.get("language")
    words = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    facts["languages"] = tuple(word for word in words if isinstance(word, str) and 0 < len(word) <= 64)[:64]
    return facts
