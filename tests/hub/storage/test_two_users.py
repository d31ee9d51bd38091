"""A team's directory: what one member writes, the others can go on with, whatever their umasks are."""

import os
import shutil
import stat
import tempfile
import traceback
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.storage.vault import Vault
from hub.store import Store

TEAM, ANN, BOB, EVE = 62_000, 61_001, 61_002, 61_003  # a group and its two members; Eve is not in it

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be two users"),
]


@pytest.fixture
def room():
    """A directory that all users can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="moduloom-users-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def team(room: Path) -> Path:
    path = room / "team"
    path.mkdir()
    os.chown(path, 0, TEAM)
    path.chmod(0o2775)
    return path


@pytest.fixture
def as_user(room: Path, directories, tmp_path: Path, monkeypatch):
    """Run a command of `hub` as one of them, with a home of their own, in a fork: they may not read this Python."""

    def run(user: int, *words: str, umask: int = 0o022, home: Path | None = None, fails: bool = False) -> str:
        own = room / f"home-{user}"
        if not own.exists():
            own.mkdir()
            os.chown(own, user, user)
        said = room / "said"
        said.touch()
        said.chmod(0o666)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setgroups([] if user == EVE else [TEAM])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                os.umask(umask)
                os.chdir(own)
                os.environ |= {"HUB_HOME": str(home or own / "hub"), "HOME": str(own)}
                result = CliRunner().invoke(main, list(words))
                code = result.exit_code
                trace = "" if result.exc_info is None else "".join(traceback.format_exception(*result.exc_info))
                said.write_text(result.output + result.stderr + (trace if code else ""))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert (code != 0) == fails, said.read_text()
        return said.read_text()

    # Once by root, so that what the commands import is there before it cannot be read any more.
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "root"))
    place, one = str(tmp_path / "place"), str(directories[0])
    for words in (
        ["push", one, "--no-trial", "--tag", "prod", "--to", place],
        ["pull", "acme/one", "--from", place],
        ["yank", "acme/one", "--reason", "x", "--at", place],
        ["remote", "add", "r", place],
        ["lock", "acme/one"],
        ["gc", "--run"],
        ["list"],
        ["tag", "acme/nope@1", "x"],
    ):
        CliRunner().invoke(main, words)
    return run


@pytest.fixture
def directories(room: Path, packed):
    """Two adapters that everybody may read."""
    copies = []
    for number, name in enumerate(("acme/one@1.0.0", "acme/two@1.0.0")):
        copies.append(shutil.copytree(packed(name, seed=number)[0], room / f"files-{number}"))
        for path in (copies[-1], *copies[-1].iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return copies


def all_of(place: Path) -> list[Path]:
    return [place, *place.rglob("*")]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_remote_that_two_push_to(as_user, team: Path, directories, umask: int) -> None:
    for user, directory, name in ((ANN, directories[0], "one"), (BOB, directories[1], "two")):
        as_user(user, "push", str(directory), "--no-trial", "--to", str(team), umask=umask)
        as_user(user, "push", f"acme/{name}", "--tag", "prod", umask=umask)
        as_user(user, "push", f"acme/{name}@prod", "--to", str(team), umask=umask)
    as_user(BOB, "yank", "acme/one@1.0.0", "--reason", "wrong", "--at", str(team), umask=umask)
    as_user(ANN, "pull", "acme/two@prod", "--from", str(team), umask=umask)
    assert Vault(team).names() == ["acme/one", "acme/two"]
    for path in all_of(team):
        mode, status = stat.S_IMODE(path.stat().st_mode), path.stat()
        assert status.st_gid == TEAM, path
        if path.is_dir():
            assert mode & 0o2070 == 0o2070, (path, oct(mode))
        elif "blobs" in path.parts:
            assert mode == 0o444, (path, oct(mode))
        else:
            assert mode & 0o060 == 0o060, (path, oct(mode))
    assert "no permission" in as_user(EVE, "push", str(directories[0]), "--no-trial", "--to", str(team), fails=True)
    assert "acme/two" in as_user(EVE, "pull", "acme/two", "--from", str(team))  # who may look may also read


def test_a_store_that_two_work_in(as_user, team: Path, directories) -> None:
    """HUB_HOME itself is shared: index, lock, remotes and lock files, too."""
    as_user(ANN, "push", str(directories[0]), "--no-trial", home=team, umask=0o077)
    as_user(BOB, "push", str(directories[1]), "--no-trial", "--tag", "prod", home=team)
    as_user(ANN, "tag", "acme/two@1.0.0", "best", home=team)
    for user in (ANN, BOB):
        as_user(user, "remote", "add", f"r{user}", f"/tmp/{user}", home=team, umask=0o077)
        as_user(user, "lock", "acme/one", home=team)
        as_user(user, "gc", "--run", home=team)
        assert "acme/two" in as_user(user, "list", home=team)
    store = Store(team)
    assert store.verify() == []
    assert store.catalogue("acme/two").aliases.keys() == {"prod", "best"}


def test_what_one_began_to_pull_another_goes_on_with(as_user, team: Path, directories, room: Path) -> None:
    as_user(ANN, "push", str(directories[0]), "--no-trial", "--to", str(room / "home-61001" / "remote"))
    store = Store(room / "home-61001" / "hub")
    weights = max(store.get("acme/one").manifest.files, key=lambda entry: entry.size)
    vault = Vault(team)
    vault.create()
    with vault.staging.room() as place:  # a pull by another user that was cut off
        (place / f"{weights.sha256}.part").write_bytes(store.blobs.path(weights.digest).read_bytes()[:100])
    (part,) = (team / "partial").iterdir()
    assert stat.S_IMODE(part.stat().st_mode) & 0o060 == 0o060
    for path in all_of(team):
        os.chown(path, BOB if path == part else path.stat().st_uid, TEAM)
    (room / "home-61001").chmod(0o755)
    as_user(ANN, "pull", "acme/one", "--from", str(room / "home-61001" / "remote"), home=team)
    assert list((team / "partial").iterdir()) == []
