import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import main
from hub.console.progress import quiet
from hub.errors import HubError, IntegrityError, ManifestError, NotFound
from hub.project.lock import Lock, Resolver, sync
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def data(*arguments: str):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def place(store: Store, publish, tmp_path: Path, base_identity) -> str:
    """A remote with acme/tone 1.0, 1.1, 2.0, acme/style 1.0, and acme/both 1.0, which requires both."""
    for i, version in enumerate(("1.0", "1.1", "2.0")):
        publish(f"acme/tone@{version}", seed=i, base=base_identity)
    style = publish("acme/style@1.0", seed=7)
    needs = ({"name": "acme/tone", "range": "<2"}, {"name": "acme/style", "digest": style.digest})
    publish("acme/both@1.0", seed=8, type="composition", expression="acme/tone + acme/style", requires=needs)
    url = str(tmp_path / "remote")
    for artifact in store.list():
        push(store, from_url(url), artifact.ref)
    return url


@pytest.fixture
def project(tmp_path: Path, monkeypatch, hub_home: Path, place: str) -> Path:
    """A directory with a modules.yaml, which is where we are; the own store is empty."""
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    (directory / "modules.yaml").write_text(f"requires: ['acme/both', 'acme/tone>=1,<3']\nfrom: {place}\n")
    return directory


def test_lock_then_sync(project: Path, place: str, hub_home: Path, store: Store, base_identity) -> None:
    locked = data("lock")
    assert [(pin["name"], pin["version"]) for pin in locked["modules"]] == [
        ("acme/both", "1.0"),
        ("acme/style", "1.0"),
        ("acme/tone", "1.1"),  # what acme/both may have
        ("acme/tone", "2.0"),  # what was asked for
    ]
    assert [pin["base"] for pin in locked["modules"]][2:] == [base_identity.weights_fingerprint] * 2
    assert {pin["source"] for pin in locked["modules"]} == {place}
    assert Store(hub_home).names() == []  # nothing was fetched
    before = (project / "modules.lock").read_bytes()
    assert [found["fetched"] for found in data("sync")] == [True] * 4
    assert [found["fetched"] for found in data("sync")] == [False] * 4
    assert {artifact.digest for artifact in Store(hub_home).list()} == {pin["digest"] for pin in locked["modules"]}
    assert Store(hub_home).verify() == []
    assert (project / "modules.lock").read_bytes() == before


def test_what_is_locked_stays_until_told(project: Path, place: str, store: Store, publish) -> None:
    data("lock")
    before = (project / "modules.lock").read_bytes()
    publish("acme/tone@2.1", seed=20)
    push(store, from_url(place), "acme/tone@2.1")
    from_url(place).yank("acme/tone", store.get("acme/tone@1.1").digest, "leaks")
    data("lock")
    assert (project / "modules.lock").read_bytes() == before
    assert data("outdated") == [
        {"name": "acme/tone", "current": "1.1", "wanted": "1.0", "latest": "2.1", "yanked": "leaks"},
        {"name": "acme/tone", "current": "2.0", "wanted": "2.1", "latest": "2.1", "yanked": None},
    ]
    assert len(data("sync")) == 4  # yanked, but locked
    upgraded = data("lock", "--upgrade")
    assert [pin["version"] for pin in upgraded["modules"] if pin["name"] == "acme/tone"] == ["1.0", "2.1"]
    assert [found["name"] for found in data("outdated")] == ["acme/tone"]  # the range of acme/both holds 1.0 back
    assert "1.0" in run("outdated").stdout


def test_outdated_without_a_lock(store: Store, place: str, tmp_path: Path, monkeypatch, publish) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUB_HOME", str(store.root))
    publish("acme/tone@3.0", seed=30)  # newer than the remote's, so it is not outdated
    assert run("outdated").exit_code == 2
    assert data("outdated", "--from", place) == []
    other = Store(tmp_path / "other")
    pull(other, from_url(place), "acme/tone@1.0")
    monkeypatch.setenv("HUB_HOME", str(other.root))
    [found] = data("outdated", "--from", place)
    assert (found["current"], found["latest"]) == ("1.0", "2.0")


def test_sync_refuses_an_old_lock(project: Path) -> None:
    data("lock")
    (project / "modules.yaml").write_text("requires: ['acme/tone']\n")
    result = run("sync")
    assert result.exit_code == 2
    assert "hub lock" in result.stderr


def test_refs_on_the_command_line(project: Path, place: str) -> None:
    (project / "modules.yaml").unlink()
    assert run("lock").exit_code == 2
    from_url(place).tag("acme/tone", "prod", from_url(place).catalogue("acme/tone").find(version="1.0").digest)
    found = data("lock", "acme/tone@prod", "--from", place)
    assert [pin["version"] for pin in found["modules"]] == ["1.0"]
    # An alias is followed when it is locked, and then not again until --upgrade.
    from_url(place).tag("acme/tone", "prod", from_url(place).catalogue("acme/tone").find(version="2.0").digest)
    assert [pin["version"] for pin in data("lock")["modules"]] == ["1.0"]
    assert [pin["version"] for pin in data("lock", "--upgrade", "--from", place)["modules"]] == ["2.0"]


def test_from_the_store_alone(store: Store, place: str, tmp_path: Path) -> None:
    lock = Resolver(store, None).lock(["acme/both"])
    assert [pin.source for pin in lock.modules] == [None] * 3
    assert [new for _, new in sync(lock, store, None, quiet)] == [False] * 3
    with pytest.raises(NotFound, match="locked from a store"):
        list(sync(lock, Store(tmp_path / "other"), None, quiet))
    assert len(list(sync(lock, Store(tmp_path / "other"), from_url(place), quiet))) == 3


def test_sync_mends_what_was_collected(project: Path, hub_home: Path) -> None:
    data("lock"), data("sync")
    store = Store(hub_home)
    store.blobs.path(store.get("acme/style").manifest.files[0].digest).unlink()
    assert [found["ref"] for found in data("sync") if found["fetched"]] == ["acme/style@1.0"]
    assert store.verify() == []


def test_toml(project: Path, place: str) -> None:
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    (project / "modules.yaml").unlink()
    (project / "modules.toml").write_text(f'requires = ["acme/tone"]\nfrom = "{place}"\n')
    assert [pin["version"] for pin in data("lock")["modules"]] == ["2.0"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "requires: acme/tone",
        "requires: []",
        "requires: [1, {}]",
        "wants: [acme/tone]",
        "a: [",
        "from: x",
        "requires: [acme/tone]\nfrom: 3",
        "requires: ['acme/tone>=x']",
        "!!python/object/apply:os.system ['true']",
    ],
)
def test_bad_wishes(project: Path, text: str) -> None:
    (project / "modules.yaml").write_text(text)
    result = run("lock")
    assert result.exit_code == 2, result.output
    assert not (project / "modules.lock").exists()


def test_an_edited_lock(project: Path, hub_home: Path) -> None:
    data("lock")
    path = project / "modules.lock"
    good = json.loads(path.read_text())
    tone = good["modules"][2]

    def edited(**changes: object) -> None:
        modules = [{**pin, **changes} if pin == tone else pin for pin in good["modules"]]
        path.write_text(json.dumps({**good, "modules": modules}))

    edited(version="1.0")
    with pytest.raises(IntegrityError, match="calls acme/tone@1"):
        list(sync(Lock.load(path), Store(hub_home), None, quiet))
    edited(base="sha256:" + "0" * 64)
    with pytest.raises(IntegrityError, match="another base"):
        list(sync(Lock.load(path), Store(hub_home), None, quiet))
    edited(digest="sha256:" + "0" * 64)
    with pytest.raises(ManifestError, match="does not say what"):
        Lock.load(path)
    for text in ("", "{}x", '{"lock_version": 9}', '{"modules": [{"name": "../x"}]}', "[]", '{"extra": 1}'):
        path.write_text(text)
        with pytest.raises(HubError) as caught:
            Lock.load(path)
        assert caught.value.hint


@pytest.mark.parametrize("how", ["modules.yaml", "--from"])
def test_a_relative_remote_stays_relative_to_the_lock(
    project: Path, place: str, hub_home: Path, tmp_path: Path, monkeypatch, how: str
) -> None:
    """A checkout that moved, with the remote beside it, goes on working from any folder."""
    (project / "modules.yaml").write_text("requires: ['acme/both']\n" + "from: ../remote\n" * (how == "modules.yaml"))
    monkeypatch.chdir(tmp_path)
    words = ["--file", "project/modules.lock", *(["--from", "remote"] if how == "--from" else [])]
    locked = data("lock", *words)
    assert {pin["source"] for pin in locked["modules"]} == {"../remote"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    project.rename(moved / "project")
    Path(place).rename(moved / "remote")
    assert len(data("sync", "--file", "elsewhere/project/modules.lock")) == 3
    assert data("outdated", "--file", "elsewhere/project/modules.lock")
