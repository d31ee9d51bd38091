"""Tombstones, computed bumps, yanks: what becomes of a version number."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import main
from hub.errors import Conflict, NotFound
from hub.manifest import TensorEntry
from hub.project.gc import collect, plan
from hub.relations.next_version import compare, raised
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def data(*arguments: str):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_deleted_version_is_never_used_again(store: Store, publish, packed, tmp_path: Path) -> None:
    artifact = publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    push(store, from_url(str(tmp_path / "remote")), "acme/tone@1.0")
    store.delete("acme/tone@1.0", "leaks names")
    assert [str(found.ref) for found in store.list(yanked=True)] == ["acme/tone@1.1"]
    with pytest.raises(NotFound, match=r"deleted \(leaks names\)"):
        store.get("acme/tone@1.0")
    for again in (
        lambda: store.put(packed("acme/tone@1.0", seed=0)[0]),
        lambda: store.put(packed("acme/tone@1.0.0", seed=2)[0]),
        lambda: pull(store, from_url(str(tmp_path / "remote")), "acme/tone@1.0"),
        lambda: push(Store(tmp_path / "remote"), from_url(str(store.root)), "acme/tone@1.0"),
    ):
        with pytest.raises(Conflict, match="never used again"):
            again()
    assert store.verify() == []
    collect(store, plan(store, grace=0), grace=0)
    assert not store.blobs.has(artifact.digest)
    assert store.verify() == []
    for _ in range(2):  # the index says the same when it is made anew from a log whose blobs are gone
        assert store.catalogue("acme/tone").tombstone("1.0").reason == "leaks names"
        assert [str(found.ref) for found in store.list(text="tone")] == ["acme/tone@1.1"]
        before = store._index.dump()
        store.rebuild_index()
        assert {**store._index.dump(), "search": 0} == {**before, "search": 0}


def test_an_evicted_version_comes_back_with_the_same_digest_alone(
    store: Store, publish, packed, tmp_path: Path
) -> None:
    artifact = publish("acme/tone@1.0")
    remote = from_url(str(tmp_path / "remote"))
    push(store, remote, "acme/tone@1.0")
    store.bury("acme/tone@1.0", "made room", final=False)
    with pytest.raises(Conflict, match="evicted"):
        store.put(packed("acme/tone@1.0", seed=5)[0])
    assert pull(store, remote, "acme/tone@1.0") == artifact
    assert store.catalogue("acme/tone").tombstones == ()
    assert store.verify() == []


def test_delete_refuses_what_is_in_use(store: Store, publish) -> None:
    publish("acme/tone@1.0")
    publish("acme/both@1.0", type="composition", expression="acme/tone", requires=({"name": "acme/tone"},))
    store.tag("acme/tone@1.0", "prod")
    with pytest.raises(Conflict, match=r"required by acme/both@1\.0"):
        store.delete("acme/tone@1.0", "no")
    with pytest.raises(Conflict, match="@prod"):
        store.delete("acme/tone@1.0", "no", force=True)
    store.untag("acme/tone", "prod")
    store.delete("acme/tone@1.0", "no", force=True)
    assert store.names() == from_url(str(store.root)).names() == ["acme/both"]


def test_delete_at_a_remote(publish, store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HUB_HOME", str(store.root))
    publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    place = str(tmp_path / "remote")
    for version in ("1.0", "1.1"):
        assert run("push", f"acme/tone@{version}", "--to", place).exit_code == 0
    assert run("delete", "acme/tone@1.1", "--reason", "leaked", "--at", place, "--force").exit_code == 2
    found = data("delete", "acme/tone@1.1", "--reason", "leaked", "--at", place)
    assert (found["ref"], found["at"]) == ("acme/tone@1.1", place)
    assert store.get("acme/tone").ref.version == "1.1"  # it is gone there alone
    result = run("push", "acme/tone@1.1", "--to", place)
    assert result.exit_code == 1
    assert "was deleted (leaked)" in result.stderr
    result = run("delete", "acme/tone@1.1", "--reason", "again", "--at", place)
    assert result.exit_code == 1
    assert "hint:" in result.stderr


def test_yank_by_text_and_at_a_remote(publish, store: Store, tmp_path: Path, monkeypatch) -> None:
    publish("acme/tone@1.0")
    assert store.yank("acme/tone@1.0", "bad").yanked == "bad"
    assert store.yank("acme/tone@1.0", None).yanked is None
    monkeypatch.setenv("HUB_HOME", str(store.root))
    data("yank", "acme/tone@1.0", "--reason", "bad")
    assert data("yank", "acme/tone@1.0", "--undo", "--reason", "a false alarm")["yanked"] is None
    assert [(event.op, event.reason) for event, _ in store.ledger.read()][-1] == ("unyank", "a false alarm")
    assert store.get("acme/tone").facts.yanked is None
    assert run("yank", "acme/tone@1.0").exit_code == 2
    assert run("yank", "acme/tone@1.0", "--undo", "--reason", "x", "--at", "/x").exit_code == 2
    place = str(tmp_path / "remote")
    push(store, from_url(place), "acme/tone@1.0")
    assert data("yank", "acme/tone@1.0", "--reason", "bad", "--at", place)["yanked"] == "bad"
    assert from_url(place).catalogue("acme/tone").releases[0].yanked == "bad"
    assert store.get("acme/tone").facts.yanked is None
    assert "warning: acme/tone@1.0 is yanked in" in run("pull", "acme/tone@1.0", "--from", place).stderr
    assert data("yank", "acme/tone@1.0", "--undo", "--at", place)["yanked"] is None
    assert from_url(place).catalogue("acme/tone").releases[0].yanked is None


def test_hub_delete(publish, store: Store, monkeypatch) -> None:
    publish("acme/tone@1.0")
    monkeypatch.setenv("HUB_HOME", str(store.root))
    assert run("delete", "acme/tone", "--reason", "x").exit_code == 2
    assert run("delete", "acme/tone@1.0").exit_code == 2
    assert data("delete", "acme/tone@1.0", "--reason", "wrong")["reason"] == "wrong"
    assert run("list").stdout == "" or "acme/tone" not in run("list").stdout


@pytest.mark.parametrize(
    ("version", "level", "expected"),
    [
        ("1.2.3", "major", "2.0.0"),
        ("1.2.3", "minor", "1.3.0"),
        ("1.2.3", "patch", "1.2.4"),
        ("1", "patch", "1.0.1"),
        ("1.2.3.4", "minor", "1.3.0"),
        ("1.0.post1", "patch", "1.0.1"),
        ("2.0rc1", "minor", "2.0.0"),
        ("0.1.dev3", "major", "0.1.0"),
    ],
)
def test_raised(version: str, level: str, expected: str) -> None:
    assert raised(version, level) == expected


def test_what_calls_for_which_level(packed, base_identity) -> None:
    _, manifest = packed(task="chat", labels=("yes", "no"), base=base_identity)
    other_base = {**base_identity.model_dump(), "arch_digest": "sha256:" + "c" * 64}
    tensor = manifest.tensors[0]
    wider = TensorEntry(name=tensor.name, dtype=tensor.dtype, shape=(8, 16), sha256="0" * 64)
    config = manifest.file("adapter_config.json")

    def files(entry):
        return tuple(f.model_copy(update={"sha256": "1" * 64}) if f == entry else f for f in manifest.files)

    for changes, level, reason in [
        ({}, None, None),
        ({"version": "7.0", "created": "2020-01-01T00:00:00Z"}, None, None),
        ({"summary": "better"}, "patch", "summary"),
        ({"files": files(manifest.file("README.md"))}, "patch", "files"),
        ({"license": "MIT"}, "patch", "license"),
        ({"metrics": ({"dataset": "d", "metric": "f1", "value": 0.5},)}, "patch", "metrics"),
        ({"tensors_digest": "sha256:" + "1" * 64}, "minor", "tensors"),
        ({"files": files(config)}, "minor", "config"),
        ({"hyperparameters": {"r": 9}}, "minor", "config"),
        ({"method": "sora"}, "minor", "method"),
        ({"requires": ({"name": "acme/a"},)}, "minor", "requirements"),
        ({"kind": "ia3"}, "major", "kind"),
        ({"placement": ("a.b",)}, "major", "placement"),
        ({"labels": ("no", "yes")}, "major", "labels"),
        ({"tensors": (wider, *manifest.tensors[1:])}, "major", "tensor shapes"),
        ({"base": other_base}, "major", "base"),
        ({"base": None}, "major", "base"),
    ]:
        change = compare(manifest, manifest.replace(**changes))
        assert change.level == level, changes
        assert reason is None or reason in change.reasons


def test_push_with_a_computed_bump(files, packed, tmp_path: Path, hub_home: Path, base_identity) -> None:
    directory, place = files(), str(tmp_path / "remote")
    (tmp_path / "base.json").write_text(base_identity.model_dump_json())
    facts = ["--name", "acme/tone", "--base", str(tmp_path / "base.json")]
    assert data("push", "--no-trial", str(directory), "--bump", "auto", "--to", place, *facts)["version"] == "1.0.0"
    result = run("push", "--no-trial", str(directory), "--bump", "auto", "--to", place)
    assert "nothing changed since acme/tone@1.0.0" in result.stderr
    (directory / "README.md").write_text("# better\n")
    assert data("push", "--no-trial", str(directory), "--bump", "auto")["version"] == "1.0.1"
    (directory / "adapter_config.json").write_text('{"lora_alpha": 16, "peft_type": "LORA", "r": 4}')
    result = run("push", "--no-trial", str(directory), "--bump", "auto", "--to", place)
    assert "acme/tone@1.0.1 -> 1.1.0: minor (config)" in result.stderr
    assert (
        data("push", "--no-trial", str(directory), "--bump", "auto", "--label", "a", "--label", "b")["version"]
        == "2.0.0"
    )
    assert run("push", "--no-trial", str(directory), "--bump", "auto", "--version", "9.0").exit_code == 2
    assert run("push", "acme/tone", "--bump", "auto").exit_code == 2
    # A number that is dead here, or taken there, is passed over.
    Store(hub_home).delete("acme/tone@2.0.0", "wrong")
    (directory / "README.md").write_text("# third\n")
    assert data("push", "--no-trial", str(directory), "--bump", "patch")["version"] == "2.0.1"
    fresh = Store(tmp_path / "fresh")
    assert [release.version for release in from_url(place).catalogue("acme/tone").releases] == ["1.0.0", "1.1.0"]
    assert pull(fresh, from_url(place), "acme/tone").ref.version == "1.1.0"


def test_a_bump_knows_what_the_remote_has(packed, store: Store, tmp_path: Path, hub_home: Path) -> None:
    directory, _ = packed("acme/tone@4.2.0")
    store.put(directory)
    push(store, from_url(str(tmp_path / "remote")), "acme/tone")
    assert (
        data("push", "--no-trial", str(directory), "--bump", "auto", "--to", str(tmp_path / "remote"))["version"]
        == "4.2.0"
    )
    (directory / "README.md").write_text("# better\n")
    assert (
        data("push", "--no-trial", str(directory), "--bump", "auto", "--to", str(tmp_path / "remote"))["version"]
        == "4.2.1"
    )
