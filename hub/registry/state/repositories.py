"""Reading: repositories, revisions and their files, out of the store and the drafts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

from hub.errors import IntegrityError, NotFound, RefError
from hub.io.files import CHUNK, open_regular
from hub.manifest import MANIFEST_NAME, Manifest
from hub.ref import AdapterRef, name_key
from hub.registry.errors import ApiError, entry_not_found, revision_not_found
from hub.registry.state import git_ids as gitids
from hub.registry.state.drafts import (
    Commit,
    Drafts,
    Recorded,
    Repo,
    find_commit,
    find_name,
    find_repo,
    moved_to,
    pairs,
    version_tags,
)
from hub.registry.state.git_ids import File
from hub.registry.state.recent import Catalogues, Recent
from hub.storage.index import Facts
from hub.storage.releases import Catalogue, Release, choose
from hub.store import Store

MAIN = "main"
SYSTEM = "moduloom"  # author of the commits that releases are
_HEX = re.compile(r"[0-9a-f]{7,40}\Z")
EPOCH = datetime.fromtimestamp(0, timezone.utc)
MAX_WALK = 500  # revisions that are looked at for who changed a file last
_CACHED = 2048  # releases whose trees are kept in memory


@dataclass(frozen=True)
class Revision:
    """One tree of files: a release, a draft, or the empty one that a new repository starts with."""

    name: str
    oid: str
    tree: Mapping[str, File] = field(default_factory=dict)
    author: str = SYSTEM
    time: float = 0.0
    title: str = ""
    message: str = ""
    parent: str | None = None
    release: Release | None = None

    def file(self, path: str) -> File:
        """Return a file; EntryNotFound otherwise."""
        if path not in self.tree:
            raise entry_not_found(self.name, path, self.oid)
        return self.tree[path]


@dataclass(frozen=True)
class Refs:
    """Names of commits: branches, tags (live versions, aliases, tags of drafts) and yanked versions."""

    branches: dict[str, str]
    tags: dict[str, str]
    yanked: dict[str, str]


class Repos:
    """Repositories of a store and its drafts.

    Parameters
    ----------
    store, drafts
        What is published, and what is not yet.
    visibility
        ``public`` or ``private``: of a repository about which nobody has said it.
    """

    def __init__(self, store: Store, drafts: Drafts, visibility: str = "public") -> None:
        self.visibility = visibility
        self.store = store
        self.drafts = drafts
        self._releases = Recent[str, Revision](_CACHED)  # by digest
        self._digests = Recent[str, str](_CACHED)  # by commit id
        self._blobs = Recent[str, str](_CACHED * 4)  # git ids by sha256
        self._facts = Recent[str, Facts](_CACHED)  # by digest
        self._catalogues = Catalogues(store, _CACHED)

    def find(self, name: str) -> Repo | None:
        """Return a repository, by the name it bears or once bore; None where there is none, or it was deleted."""
        with self.drafts.read() as db:
            repo = find_repo(db, name)
            if repo is None and (new := moved_to(db, name)) is not None:
                repo = find_repo(db, new)
        if repo is not None:
            return None if repo.deleted else repo
        catalogue = self.catalogue(name)
        return Repo(catalogue.name, self.visibility) if catalogue.releases else None

    def catalogue(self, name: str) -> Catalogue:
        """Releases and aliases of a name."""
        return self._catalogues.get(name)

    def recorded(self) -> Recorded:
        """All repositories with a row of their own, deleted ones too, by the key of their name (`hub.ref.name_key`)."""
        with self.drafts.read() as db:
            rows = db.execute("SELECT name, visibility, gated, created, deleted FROM repos").fetchall()
        repos = {name_key(row[0]): Repo(row[0], row[1], row[2], row[3], bool(row[4])) for row in rows}
        return Recorded(repos, self.visibility)

    def resolve(self, name: str, revision: str) -> Revision:
        """Return the revision that a branch, tag, version, alias, digest or commit id stands for."""
        with self.drafts.read() as db:
            oid = find_name(db, "branches", name, revision) or find_name(db, "tags", name, revision)
            commit = find_commit(db, name, oid) if oid else None
        if commit is not None:
            return draft_revision(name, commit)
        catalogue = self.catalogue(name)
        if revision == MAIN:
            return self._newest(catalogue)
        if _HEX.match(revision) and (at := self._by_oid(catalogue, revision)):
            return at
        return self._published(catalogue, revision)

    def head(self, name: str, branch: str) -> Revision:
        """Return the head of a branch; RevisionNotFound for any other kind of revision."""
        with self.drafts.read() as db:
            known = pairs(db, "branches", name)
        if branch != MAIN and branch not in known:
            raise revision_not_found(name, branch, "commits go to a branch; main always exists")
        return self.resolve(name, branch)

    def refs(self, name: str) -> Refs:
        """All names of commits."""
        catalogue = self.catalogue(name)
        with self.drafts.read() as db:
            branches, tags = pairs(db, "branches", name), pairs(db, "tags", name)
            written = version_tags(db, name)
        branches.setdefault(MAIN, self._newest(catalogue).oid)
        oids = {release.digest: self.of_release(name, release).oid for release in catalogue.releases}
        live = {
            written.get(release.version, release.version): oids[release.digest]
            for release in catalogue.releases
            if release.yanked is None
        }
        dead = {release.version: oids[release.digest] for release in catalogue.releases if release.yanked is not None}
        aliases = {alias: oids[digest] for alias, digest in sorted(catalogue.aliases.items())}
        return Refs(branches, {**live, **aliases, **tags}, dead)

    def history(self, revision: Revision) -> Iterator[Revision]:
        """A revision and those before it: drafts along their parents, then the releases, newest first."""
        name, at = revision.name, revision
        while at.release is None:
            yield at
            if at.parent is None:
                return
            try:
                at = self.resolve(name, at.parent)
            except ApiError:  # superseded long ago, and swept
                return
        older = [self.of_release(name, release) for release in reversed(self.catalogue(name).releases)]
        start = next((place for place, other in enumerate(older) if other.oid == at.oid), None)
        yield from older[start:]

    def last_changes(self, revision: Revision) -> dict[str, Revision]:
        """Path of each file and folder of a revision -> the newest revision that made it what it is.

        At most `MAX_WALK` revisions are looked at; what did not change in them is ascribed to the last of these.
        """
        at, last = revision, dict[str, Revision]()
        wanted, here = set(contents(at.tree)), contents(at.tree)
        for older in islice(self.history(revision), 1, MAX_WALK):
            before = contents(older.tree)
            changed = {path for path in wanted if before.get(path) != here[path]}
            last |= dict.fromkeys(changed, at)
            wanted -= changed
            at, here = older, before
        return last | dict.fromkeys(wanted, at)

    def of_release(self, name: str, release: Release) -> Revision:
        """Return the revision that a published version is."""
        known = self._releases.get(release.digest)
        if known is None:
            known = self._releases.put(release.digest, self._build(name, release))
            self._digests.put(known.oid, release.digest)
        return replace(known, release=release)  # whether it is yanked is not in the cache

    def facts(self, name: str, release: Release) -> Facts:
        """What the index knows of a release; of aliases and yanks, the catalogue knows more."""
        facts = self._facts.get(release.digest)
        if facts is None:
            artifact = self.store.get(AdapterRef.parse(name).at(digest=release.digest))
            facts = self._facts.put(release.digest, artifact.facts)
        return facts

    def path(self, file: File) -> Path:
        """Where the bytes of a file are: in the store, or among the drafts."""
        for blobs in (self.store.blobs, self.drafts.blobs):
            if blobs.has(file.digest, file.size):
                return blobs.path(file.digest)
        raise IntegrityError(f"blob {file.digest} is missing", digest=file.digest, hint="`hub verify` lists all damage")

    def blob_oid(self, file: File) -> str:
        """Git id of a file's content; computed once a process, while the sha256 is checked."""
        known = self._blobs.get(file.sha256)
        if known is not None:
            return known
        git, plain = gitids.blob_hasher(file.size), hashlib.sha256()
        with open_regular(self.path(file)) as source:
            while chunk := source.read(CHUNK):
                git.update(chunk)
                plain.update(chunk)
        if plain.hexdigest() != file.sha256:
            raise IntegrityError(f"blob {file.digest} is damaged", digest=file.digest, path=self.path(file))
        return self._blobs.put(file.sha256, git.hexdigest())

    def entry_oids(self, tree: Mapping[str, File]) -> dict[str, str]:
        """Path -> git id of what git would keep there: the content, or the pointer of a large file."""
        return {
            path: gitids.pointer_oid(file) if gitids.is_large(path, file.size) else self.blob_oid(file)
            for path, file in tree.items()
        }

    def etag(self, path: str, file: File) -> str:
        """Entity tag of a file, without quotes: the sha256 of a large file, else its git id."""
        return file.sha256 if gitids.is_large(path, file.size) else self.blob_oid(file)

    def _newest(self, catalogue: Catalogue) -> Revision:
        try:
            release = choose(AdapterRef.parse(catalogue.name), catalogue)
        except NotFound:  # nothing published, or all of it yanked
            return empty(catalogue.name)
        return self.of_release(catalogue.name, release)

    def _published(self, catalogue: Catalogue, revision: str) -> Revision:
        try:
            release = choose(AdapterRef.parse(f"{catalogue.name}@{revision}"), catalogue)
        except RefError:
            raise revision_not_found(catalogue.name, revision) from None
        except NotFound as error:
            raise revision_not_found(catalogue.name, revision, error.hint) from None
        return self.of_release(catalogue.name, release)

    def _by_oid(self, catalogue: Catalogue, prefix: str) -> Revision | None:
        """Revision whose commit id starts so; None where there is none, or more than one."""
        name = catalogue.name
        release = catalogue.find(digest=self._digests.get(prefix) or "")
        if release is not None:  # a whole id of a release that was asked for before
            return self.of_release(name, release)
        with self.drafts.read() as db:
            rows = db.execute(
                "SELECT oid FROM commits WHERE repo = ? AND oid >= ? AND oid < ? || 'g' LIMIT 2", (name, prefix, prefix)
            ).fetchall()
            drafts = [commit for row in rows if (commit := find_commit(db, name, row[0]))]
        known = [draft_revision(name, commit) for commit in drafts]
        known += [empty(name), *(self.of_release(name, release) for release in catalogue.releases)]
        matches = {revision.oid: revision for revision in known if revision.oid.startswith(prefix)}
        return next(iter(matches.values())) if len(matches) == 1 else None

    def _build(self, name: str, release: Release) -> Revision:
        manifest = self.store.manifest(release.digest)
        tree = release_tree(manifest)
        title, root = f"{manifest.name} {manifest.version}", gitids.trees(self.entry_oids(tree))[""]
        # The id is that of the manifest everywhere, so it knows no time of this registry; what is shown does.
        oid = gitids.commit_oid(root, (), SYSTEM, manifest.created or EPOCH, f"{title}\n\n{manifest.digest}")
        published = datetime.fromisoformat(self.facts(name, release).created.replace("Z", "+00:00"))
        return Revision(name, oid, tree, time=published.timestamp(), title=title, message=manifest.digest)


def release_tree(manifest: Manifest) -> dict[str, File]:
    """Files of an artifact and its ``module.json``, whose sha256 is the artifact's digest."""
    tree = {entry.path: File(entry.sha256, entry.size) for entry in manifest.files}
    tree[MANIFEST_NAME] = File(manifest.digest.removeprefix("sha256:"), len(manifest.canonical))
    return dict(sorted(tree.items()))


def contents(tree: Mapping[str, File]) -> dict[str, object]:
    """What each file and each folder of a tree holds, to be compared with another tree's."""
    folders: dict[str, list[tuple[str, File]]] = {}
    for path, file in tree.items():
        for place, mark in enumerate(path):
            if mark == "/":
                folders.setdefault(path[:place], []).append((path, file))
    return {**tree, **folders}


def draft_revision(name: str, commit: Commit) -> Revision:
    """Return the revision that a draft is."""
    return Revision(
        name, commit.oid, commit.tree, commit.author, commit.time, commit.title, commit.message, commit.parent
    )


def empty(name: str) -> Revision:
    """Return the revision that a repository without files starts with."""
    return Revision(name, gitids.commit_oid(gitids.trees({})[""], (), SYSTEM, EPOCH, name), title="a new repository")
