"""What the API says about repositories and files, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from hub.io.files import read_capped
from hub.registry.context import Access
from hub.registry.state import git_ids as gitids
from hub.registry.state.drafts import Repo
from hub.registry.state.front_matter import MAX_CARD, front_matter
from hub.registry.state.git_ids import File
from hub.registry.state.repositories import Repos, Revision
from hub.storage.index import Facts

_PIPELINES = {
    "causal_lm": "text-generation",
    "classification": "text-classification",
    "multi_label_classification": "text-classification",
    "token_classification": "token-classification",
    "seq2seq": "text2text-generation",
    "masked_lm": "fill-mask",
}


def time_text(seconds: float) -> str:
    """Time in the one form that clients parse."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def pipeline(task: str | None) -> str | None:
    """Name of a task on the Hugging Face Hub, where it has one."""
    return _PIPELINES.get(task or "", task)


def tags_of(facts: Facts) -> list[str]:
    """Tags that clients filter by."""
    tags = ["moduloom", "peft" if facts.type == "adapter" else facts.type, facts.kind, facts.method, facts.task]
    tags.append(pipeline(facts.task))
    if facts.base:
        tags += [f"base_model:{facts.base}", f"base_model:adapter:{facts.base}"]
    if facts.license:
        tags.append(f"license:{facts.license}")
    return list(dict.fromkeys(tag for tag in tags if tag))


def listed(facts: Facts, repo: Repo) -> dict[str, Any]:
    """Entry of a list for a repository, from its newest release."""
    return {
        "_id": facts.digest.removeprefix("sha256:")[:24],
        "id": facts.name,
        "modelId": facts.name,
        "author": facts.name.split("/")[0],
        "private": repo.private,
        "gated": repo.gated or False,
        "createdAt": _canonical(facts.created),
        "lastModified": _canonical(facts.created),
        "pipeline_tag": pipeline(facts.task),
        "library_name": "peft",
        "tags": tags_of(facts),
    }


def listed_draft(repo: Repo) -> dict[str, Any]:
    """Entry of a list for a repository without a release."""
    return {
        "_id": repo.name,
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.split("/")[0],
        "private": repo.private,
        "gated": repo.gated or False,
        "createdAt": time_text(repo.created),
        "lastModified": time_text(repo.created),
        "tags": ["draft"],
    }


def described(access: Access, revision: Revision, *, blobs: bool) -> dict[str, Any]:
    """All about one revision of a repository; sizes and ids of its files where `blobs` says so."""
    repos, repo = access.repos, access.repo
    if revision.release is not None:
        about = listed(repos.facts(access.name, revision.release), repo)
    else:
        about = {**listed_draft(repo), "library_name": "peft" if "adapter_config.json" in revision.tree else None}
    card = _card_data(repos, revision)
    written = card.get("tags")
    own = [tag for tag in written if isinstance(tag, str)] if isinstance(written, list) else []
    about["tags"] = list(dict.fromkeys([*about["tags"], *own]))
    siblings = [_sibling(repos, path, file) if blobs else {"rfilename": path} for path, file in revision.tree.items()]
    return {
        **about,
        "sha": revision.oid,
        "cardData": card or None,
        "lastModified": time_text(revision.time),
        "disabled": False,
        "usedStorage": sum(file.size for file in revision.tree.values()),
        "siblings": siblings,
    }


def _card_data(repos: Repos, revision: Revision) -> dict[str, Any]:
    """YAML in front of the card, as JSON: dates become texts."""
    file = revision.tree.get("README.md")
    if file is None or file.size > MAX_CARD:
        return {}
    text = read_capped(repos.path(file), MAX_CARD).decode("utf-8", "replace")
    card: dict[str, Any] = json.loads(json.dumps(front_matter(text), default=str))
    return card


def _sibling(repos: Repos, path: str, file: File) -> dict[str, Any]:
    sibling = {"rfilename": path, "size": file.size, "blobId": repos.entry_oids({path: file})[path]}
    if gitids.is_large(path, file.size):
        sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(gitids.pointer(file))}
    return sibling


def entries(repos: Repos, revision: Revision, *, expand: bool) -> dict[str, dict[str, Any]]:
    """All files and folders of a revision, by path."""
    oids = repos.entry_oids(revision.tree)
    listed: dict[str, dict[str, Any]] = {}
    for path, file in revision.tree.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": oids[path]}
        if gitids.is_large(path, file.size):
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(gitids.pointer(file))}
        listed[path] = entry
    for path, oid in gitids.trees(oids).items():
        if path:
            listed[path] = {"type": "directory", "path": path, "size": 0, "oid": oid}
    if expand:
        for path, last in repos.last_changes(revision).items():
            listed[path]["lastCommit"] = {"id": last.oid, "title": last.title, "date": time_text(last.time)}
    return dict(sorted(listed.items()))


def commits(revisions: Iterable[Revision]) -> list[dict[str, Any]]:
    """Log of commits."""
    return [
        {
            "id": revision.oid,
            "title": revision.title,
            "message": revision.message,
            "authors": [{"user": revision.author}],
            "date": time_text(revision.time),
        }
        for revision in revisions
    ]


def _canonical(created: str) -> str:
    """Time of a manifest in the form of `time_text`."""
    return time_text(datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp())
