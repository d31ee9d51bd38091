import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import main
from hub.errors import Conflict, NotFound, StoreError, UsageError
from hub.project.named_remotes import Remotes
from hub.remotes import from_url


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def test_push_and_pull_by_name(publish, store, tmp_path: Path, monkeypatch, hub_home: Path) -> None:
    artifact = publish()
    monkeypatch.setenv("HUB_HOME", str(store.root))
    assert run("remote", "add", "team", str(tmp_path / "share")).exit_code == 0
    assert run("push", "acme/tone", "--to", "team").exit_code == 0
    monkeypatch.setenv("HUB_HOME", str(hub_home))
    result = run("pull", "acme/tone", "--from", "taem")
    assert result.exit_code == 1
    assert "there is no remote 'taem'" in result.stderr
    run("remote", "add", "team", str(tmp_path / "share"))
    assert json.loads(run("pull", "acme/tone", "--from", "team", "--json").stdout)["digest"] == artifact.digest
    assert "did you mean team?" in run("pull", "acme/tone", "--from", "taem").stderr
    assert json.loads(run("remote", "list", "--json").stdout) == [{"name": "team", "url": str(tmp_path / "share")}]
    assert run("remote", "remove", "team").exit_code == 0
    assert run("remote", "list").stdout == ""
    assert (tmp_path / "share" / "log.jsonl").exists()


def test_a_name_is_moved_only_when_told(tmp_path: Path) -> None:
    remotes = Remotes(tmp_path)
    remotes.add("team", "memory://one")
    remotes.add("team", "memory://one")
    with pytest.raises(Conflict, match="memory://one"):
        remotes.add("team", "memory://two")
    remotes.add("team", "memory://two", replace=True)
    assert remotes.url("team") == "memory://two"
    with pytest.raises(NotFound):
        remotes.remove("other")


def test_what_is_a_name_and_what_is_a_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    remotes = Remotes(tmp_path / "home")
    (tmp_path / "share").mkdir()
    for text in ("share", "./new", "~/new", "/new", "s3://bucket/x", "sub/dir"):
        assert remotes.url(text) == text
    with pytest.raises(NotFound, match="no remote 'new'") as caught:
        remotes.url("new")
    assert "./new" in caught.value.hint
    remotes.add("share", "memory://x")
    assert remotes.url("share") == "memory://x"  # a name goes before a directory


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/x", "oci://user@host/x", "hf+https://me:secret@host", "s3://bucket/x?token=secret"]
)
def test_credentials_are_neither_kept_nor_shown(tmp_path: Path, url: str) -> None:
    remotes = Remotes(tmp_path)
    for call in (from_url, lambda url: remotes.add("team", url)):
        with pytest.raises(UsageError) as caught:
            call(url)
        assert "secret" not in str(caught.value) + caught.value.hint
        assert "credentials" in caught.value.hint
    assert not remotes.path.exists()


@pytest.mark.parametrize("name", ["", "Team", "a b", "../x", "-x", "x" * 65, "s3://x"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Remotes(tmp_path).add(name, "memory://x")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{", '{"a": "memory://x", "a": "memory://y"}'])
def test_a_broken_file(tmp_path: Path, text: str) -> None:
    remotes = Remotes(tmp_path)
    remotes.path.write_text(text)
    with pytest.raises(StoreError) as caught:
        remotes.add("team", "memory://x")
    assert caught.value.hint
    assert remotes.path.read_text() == text


def test_unknown_scheme_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no remote for gopher"):
        Remotes(tmp_path).add("team", "gopher://x")
