"""Writing: repositories, commits, branches. Tags, which publish, are in `hub.registry.state.publish`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from hub.contents.checks import check_file_set
from hub.errors import GateError
from hub.io.files import MAX_FILES, check_relative
from hub.manifest import Draft
from hub.ref import AdapterRef, name_key
from hub.registry.errors import ApiError, revision_not_found
from hub.registry.state import git_ids as gitids
from hub.registry.state.commit_stream import CommitRequest, Operation, ignored
from hub.registry.state.drafts import Commit, Repo, find_repo, forget, pairs, rename, save_commit, save_repo
from hub.registry.state.git_ids import File
from hub.registry.state.repositories import MAIN, Repos, Revision
from hub.registry.tokens import Caller

# Paths alone are checked here: a router is the type that needs no particular file.
MAX_TITLE = 1000  # characters
_ANY = Draft(name="any/draft", version="0", type="router")


@dataclass(frozen=True)
class Committed:
    """What a commit led to; `new` is False when it changed nothing."""

    revision: Revision
    new: bool


def create_repo(repos: Repos, name: str, *, visibility: str, gated: str = "") -> Repo:
    """Make a repository. ApiError: 409 when it exists, 410 when it was deleted and had versions."""
    repo = Repo(name, visibility, gated, time.time())
    released = bool(repos.catalogue(name).releases)
    with repos.drafts.change() as db:
        present = find_repo(db, name)
        if present is not None and present.deleted:
            raise ApiError(410, f"{name} was deleted and its name stays dead", headers={"X-Repo-Name": name})
        if present is not None or released:
            raise ApiError(409, f"You already created this model repo: {name}")
        save_repo(db, repo)
        db.execute("DELETE FROM moves WHERE old = ?", (name,))
    return repo


def change_settings(repos: Repos, name: str, *, visibility: str | None, gated: str | None) -> Repo:
    """Change who may see a repository; what is None stays as it is."""
    with repos.drafts.change() as db:
        repo = find_repo(db, name) or Repo(name, created=time.time())
        repo = replace(
            repo,
            visibility=repo.visibility if visibility is None else visibility,
            gated=repo.gated if gated is None else gated,
        )
        save_repo(db, repo)
    return repo


def move_repo(repos: Repos, name: str, new: str) -> None:
    """Give a repository that has no version another name; the old one leads there until it is taken again.

    Raises
    ------
    ApiError
        400 where it has versions, 409 where the new name is taken, 410 where that is dead.
    """
    catalogue = repos.catalogue(name)
    if catalogue.releases or catalogue.tombstones:
        raise ApiError(
            400,
            f"{name} has versions, and its name is part of what was published: make {new} and publish there; "
            "yank the versions here",
        )
    released = bool(repos.catalogue(new).releases)
    with repos.drafts.change() as db:
        present = find_repo(db, new)
        if present is not None and present.deleted:
            raise ApiError(410, f"{new} was deleted and its name stays dead")
        if released or (present is not None and name_key(new) != name_key(name)):
            raise ApiError(409, f"there is a repository {new} already")
        rename(db, name, new)


def delete_repo(repos: Repos, name: str, *, who: str) -> None:
    """Delete a repository for good: its drafts, and its versions with all aliases; of those, the name stays dead.

    Their bytes go with the next `hub gc` of the store.

    Raises
    ------
    ApiError
        409 where another artifact requires one of its versions.
    """
    catalogue, store = repos.catalogue(name), repos.store
    needed = {ref for release in catalogue.releases for ref in store.requiring(release.digest)}
    if others := sorted(ref for ref in needed if name_key(AdapterRef.parse(ref).id) != name_key(name)):
        shown = ", ".join(others[:5])
        raise ApiError(409, f"{name} is required by {shown}: delete those first, or delete its tags, which yanks it")
    for alias in catalogue.aliases:
        store.untag(AdapterRef.parse(name), alias)
    with repos.drafts.change() as db:
        forget(db, name)
        db.execute("DELETE FROM repos WHERE name = ?", (name,))
        if catalogue.releases:
            save_repo(db, Repo(name, "private", created=time.time(), deleted=True))
    for release in catalogue.releases:
        store.bury(AdapterRef.parse(name).at(digest=release.digest), f"repository deleted by {who}")
    repos.drafts.sweep()


def check_path(path: str) -> None:
    """Refuse a path that no artifact holds: escapes, pickles, code, archives. ApiError (400)."""
    try:
        check_file_set([check_relative(path)], _ANY)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    except GateError as error:
        raise ApiError(400, f"{error.message} ({error.hint})") from error


def commit(repos: Repos, name: str, branch: str, request: CommitRequest, caller: Caller) -> Committed:
    """Add a draft revision to a branch.

    Raises
    ------
    ApiError
        412 when the head is not `request.parent` any more; 400, 404 for operations that cannot be.
    """
    operations = [operation for operation in request.operations if not ignored(operation.path)]
    for operation in operations:
        if operation.verb in ("add", "link"):
            check_path(operation.path)
    adopt(repos, operations)
    while True:
        head = repos.head(name, branch)
        _check_parent(repos, head, request.parent)
        tree = _apply(repos, head, operations)
        if tree == dict(head.tree):
            return Committed(head, new=False)
        draft = _make(repos, head, tree, request, caller)
        with repos.drafts.change() as db:
            # The tree was built without the lock, since that may read files: it holds if the head has not moved.
            if repos.head(name, branch).oid == head.oid:
                save_commit(db, name, draft, branch)
                break
    return Committed(repos.resolve(name, draft.oid), new=True)


def adopt(repos: Repos, operations: Iterable[Operation]) -> None:
    """Take the staged bytes of operations in among the blobs of drafts."""
    for operation in operations:
        if operation.verb == "add" and operation.file is not None and operation.staged is not None:
            take_blob(repos, operation.file, operation)


def take_blob(repos: Repos, file: File, operation: Operation) -> None:
    """Adopt one staged file; one that is here already is marked as young, so that no sweep takes it."""
    blobs = repos.drafts.blobs
    if operation.staged is None:
        return
    if blobs.has(file.digest, file.size):
        blobs.path(file.digest).touch()
        operation.staged.unlink()
    else:
        blobs.adopt(operation.staged, file.digest)


def create_branch(repos: Repos, name: str, branch: str, start: str) -> None:
    """Let a new branch begin at a revision. ApiError: 400, 404, 409."""
    if branch == MAIN or branch in repos.refs(name).branches:
        raise ApiError(409, f"{name} has a branch {branch!r} already")
    check_free(repos, name, branch)
    if AdapterRef.parse(f"{name}@{branch}").alias is None:
        raise ApiError(400, f"{branch!r} is the name of a version, not of a branch")
    head = repos.resolve(name, start)
    draft = Commit(head.oid, head.parent, head.tree, head.author, head.time, head.title, head.message)
    with repos.drafts.change() as db:
        save_commit(db, name, draft, branch)


def delete_branch(repos: Repos, name: str, branch: str) -> None:
    """Remove a branch; its commits are swept later."""
    if branch == MAIN:
        raise ApiError(403, "main cannot be deleted")
    with repos.drafts.change() as db:
        if branch not in pairs(db, "branches", name):
            raise revision_not_found(name, branch)
        db.execute("DELETE FROM branches WHERE repo = ? AND name = ?", (name, branch))


def check_free(repos: Repos, name: str, label: str) -> None:
    """Refuse a name for a branch or tag that is malformed (400) or means something already (409)."""
    ref = AdapterRef.parse(f"{name}@{label}")
    refs = repos.refs(name)
    if label in refs.branches or label in refs.tags or label == "latest":
        raise ApiError(409, f"{name} has {label!r} already: it stands for a commit, and stays there")
    if ref.version is not None and repos.catalogue(name).find(version=ref.version):
        raise ApiError(409, f"{name} has version {ref.version}; versions are immutable")


def _check_parent(repos: Repos, head: Revision, parent: str | None) -> None:
    if parent is None or head.oid.startswith(parent):
        return
    if head.release is not None:
        with repos.drafts.read() as db:
            row = db.execute(
                "SELECT oid FROM origins WHERE repo = ? AND digest = ?", (head.name, head.release.digest)
            ).fetchone()
        if row and row[0].startswith(parent):
            return
    raise ApiError(
        412, f"A commit has happened since: {head.name} is at {head.oid[:12]}, not at {parent[:12]}. Refresh, try again"
    )


def _apply(repos: Repos, head: Revision, operations: list[Operation]) -> dict[str, File]:
    tree = dict(head.tree)
    for operation in operations:
        path = operation.path
        if operation.verb == "add" and operation.file is not None:
            tree[path] = operation.file
        elif operation.verb == "link" and operation.file is not None:
            tree[path] = _linked(repos, head.name, operation.file)
        elif operation.verb == "delete":
            if path not in tree:
                raise _missing(head, path)
            del tree[path]
        else:
            inside = [known for known in tree if known.startswith(f"{path}/")]
            if not inside:
                raise _missing(head, path)
            for known in inside:
                del tree[known]
    _check_tree(tree)
    return tree


def _missing(head: Revision, path: str) -> ApiError:
    text = f"A file with this name doesn't exist: {path}"
    return ApiError(404, text, code="EntryNotFound", headers={"X-Repo-Commit": head.oid})


def _linked(repos: Repos, name: str, wanted: File) -> File:
    """Content that was uploaded to this very repository: knowing a hash must not open another one's files."""
    with repos.drafts.read() as db:
        row = db.execute("SELECT size FROM uploads WHERE repo = ? AND sha256 = ?", (name, wanted.sha256)).fetchone()
    size = row[0] if row else known_size(repos, name, wanted.sha256)
    if size is None:
        raise ApiError(400, f"sha256 {wanted.sha256[:16]}... was not uploaded to {name}")
    if wanted.size not in (-1, size):
        raise ApiError(400, f"sha256 {wanted.sha256[:16]}... has {size} bytes, not {wanted.size}")
    return File(wanted.sha256, size)


def known_size(repos: Repos, name: str, sha256: str) -> int | None:
    """Size of a content that some revision of a repository holds, or None."""
    from hub.registry.state.drafts import load_tree

    with repos.drafts.read() as db:
        trees = [load_tree(row[0]) for row in db.execute("SELECT tree FROM commits WHERE repo = ?", (name,))]
    trees += [dict(repos.of_release(name, release).tree) for release in repos.catalogue(name).releases]
    return next((file.size for tree in trees for file in tree.values() if file.sha256 == sha256), None)


def _check_tree(tree: dict[str, File]) -> None:
    if len(tree) > MAX_FILES:
        raise ApiError(413, f"a repository has at most {MAX_FILES} files")
    folders = {path[:place].casefold() for path in tree for place, mark in enumerate(path) if mark == "/"}
    folded: dict[str, str] = {}
    for path in tree:
        other = folded.setdefault(path.casefold(), path)
        if other != path or path.casefold() in folders:
            raise ApiError(400, f"{path} and {other} cannot both be in a directory")


def _make(repos: Repos, head: Revision, tree: dict[str, File], request: CommitRequest, caller: Caller) -> Commit:
    now = datetime.now(timezone.utc)
    author = caller.name or "anonymous"
    title, _, rest = request.title.strip().partition("\n")
    title, message = (
        title.strip()[:MAX_TITLE] or "Update",
        "\n\n".join(filter(None, (rest.strip(), request.description))),
    )
    root = gitids.trees(repos.entry_oids(tree))[""]
    parent = head.oid if head.tree or head.release else None
    oid = gitids.commit_oid(root, [parent] if parent else [], author, now, f"{title}\n\n{message}")
    return Commit(oid, parent, dict(sorted(tree.items())), author, now.timestamp(), title, message)
