"""Git object ids are those that git itself computes."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest

from hub.registry.state import git_ids as gitids

WHEN = datetime(2026, 11, 21, 12, 0, tzinfo=timezone.utc)
FILES = {
    "README.md": b"# tone\n",
    "aux/a.txt": b"",
    "aux/deep/b.txt": b"b",
    "aux.txt": b"sorts before aux/",
    "z": b"\0",
}


def git(directory: Path, *words: str) -> str:
    stamp = f"{int(WHEN.timestamp())} +0000"
    who = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in (
        ("NAME", "alice"), ("EMAIL", "alice@registry"), ("DATE", stamp))}  # fmt: skip
    keep = {"PATH": os.environ["PATH"], "HOME": str(directory), "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", "-C", str(directory), *words], env={**keep, **who}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_against_git(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    git(tmp_path, "add", *FILES)
    git(tmp_path, "commit", "-q", "--cleanup=verbatim", "-m", "first\n\nwith a body")
    blobs = {path: gitids.blob_of_file(tmp_path / path) for path in FILES}
    assert blobs == {path: git(tmp_path, "hash-object", path) for path in FILES}
    trees = gitids.trees(blobs)
    assert trees == {
        "": git(tmp_path, "rev-parse", "HEAD^{tree}"),
        "aux": git(tmp_path, "rev-parse", "HEAD:aux"),
        "aux/deep": git(tmp_path, "rev-parse", "HEAD:aux/deep"),
    }
    head = git(tmp_path, "rev-parse", "HEAD")
    # `git commit -m` ends a message with a newline; ours does not.
    assert gitids.commit_oid(trees[""], [], "alice", WHEN, "first\n\nwith a body\n") == head
    (tmp_path / "z").write_bytes(b"2")
    git(tmp_path, "commit", "-qam", "second")
    trees = gitids.trees({**blobs, "z": gitids.blob_of_file(tmp_path / "z")})
    assert gitids.commit_oid(trees[""], [head], "alice", WHEN, "second\n") == git(tmp_path, "rev-parse", "HEAD")


def test_known_ids() -> None:
    assert gitids.trees({})[""] == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's empty tree
    file = gitids.File("4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8", 12)
    assert gitids.pointer(file).decode().splitlines() == [
        "version https://git-lfs.github.com/spec/v1",
        "oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8",
        "size 12",
    ]
    assert gitids.is_large("x/y.safetensors", 1) and gitids.is_large("x.txt", gitids.LFS_FROM)
    assert not gitids.is_large("x.txt", 9)
