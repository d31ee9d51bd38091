import json
import os
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.errors import ManifestError
from hub.project.gc import GRACE, collect, plan
from hub.project.lock import Resolver, Roots
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push


def age(store: Store) -> None:
    """All blobs become older than the grace."""
    long_ago = time.time() - 2 * GRACE
    for digest in store.blobs:
        os.utime(store.blobs.path(digest), (long_ago, long_ago))


def gone(store: Store, **options: bool) -> set[str]:
    age(store)
    wanted = plan(store, **options)
    collect(store, wanted)
    assert store.verify() == []
    return {str(artifact.ref) for artifact in wanted.releases}


def test_a_plan_changes_nothing_and_a_clean_store_loses_nothing(store: Store, publish) -> None:
    publish("acme/tone@1.0")
    age(store)
    before = sorted(store.blobs)
    assert plan(store).blobs == ()
    assert collect(store, plan(store)) == 0
    assert sorted(store.blobs) == before


def test_the_bytes_of_what_was_deleted(store: Store, publish) -> None:
    shared = publish("acme/tone@1.0").manifest
    kept = publish("acme/tone@1.1", summary="same bytes but for the manifest").manifest
    shared_blobs = {entry.digest for entry in shared.files} & {entry.digest for entry in kept.files}
    assert shared_blobs
    store.delete("acme/tone@1.0", "wrong")
    assert plan(store).blobs == ()  # young
    age(store)
    wanted = plan(store)
    assert shared.digest in wanted.blobs
    assert not shared_blobs & set(wanted.blobs)
    assert collect(store, wanted) == wanted.size > 0
    assert store.verify() == []
    store.rebuild_index()
    assert [str(artifact.ref) for artifact in store.list()] == ["acme/tone@1.1"]


def test_what_leads_to_a_release_keeps_it(store: Store, publish, tmp_path: Path) -> None:
    """Newest versions, aliases, lock files; and what those require or come from."""
    old = publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    publish("acme/tone@1.2", seed=2)
    publish("acme/tone@1.3", seed=3, lineage={"parents": (f"acme/tone@{old.digest}",)})
    publish("acme/base@1.0", seed=4)
    publish("acme/base@2.0", seed=5)
    publish("acme/base@3.0", seed=6)
    publish("acme/both@1.0", type="composition", expression="x", requires=({"name": "acme/base", "range": "<2"},))
    store.tag("acme/tone@1.1", "prod")
    lock = tmp_path / "modules.lock"
    Resolver(store, None).lock(["acme/base==2.0"]).save(lock)
    Roots(store).add(store, lock)
    assert gone(store) == set()
    assert gone(store, superseded=True) == {"acme/tone@1.2"}
    lock.unlink()
    assert gone(store, superseded=True) == {"acme/base@2.0"}
    store.untag("acme/tone", "prod")
    store.yank("acme/tone@1.3", "bad")  # so that 1.1 is the newest
    store.delete("acme/both@1.0", "no")
    assert gone(store, superseded=True) == {"acme/tone@1.3", "acme/tone@1.0", "acme/base@1.0"}
    assert [str(artifact.ref) for artifact in store.list()] == ["acme/base@3.0", "acme/tone@1.1"]


def test_what_was_evicted_can_be_pulled_again(store: Store, publish, tmp_path: Path) -> None:
    old = publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    push(store, from_url(str(tmp_path / "remote")), "acme/tone@1.0")
    assert gone(store, superseded=True) == {"acme/tone@1.0"}
    assert not store.blobs.has(old.digest)
    assert pull(store, from_url(str(tmp_path / "remote")), "acme/tone@1.0") == old
    assert store.verify() == []


def test_a_broken_lock_stops_it(store: Store, publish, tmp_path: Path) -> None:
    publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    (tmp_path / "modules.lock").write_text("{")
    Roots(store).add(store, tmp_path / "modules.lock")
    with pytest.raises(ManifestError):
        plan(store, superseded=True)


def test_what_changed_since_the_plan_is_spared(store: Store, publish, packed) -> None:
    publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    publish("acme/tone@1.2", seed=2)
    directory, dead = packed("acme/dead@1.0", seed=9)
    store.put(directory)
    store.delete("acme/dead@1.0", "no")
    age(store)
    wanted = plan(store, superseded=True)
    assert {str(artifact.ref) for artifact in wanted.releases} == {"acme/tone@1.0", "acme/tone@1.1"}
    store.tag("acme/tone@1.0", "prod")  # an alias, and a new release that shares all its files with a dead one
    again = publish("acme/alive@1.0", seed=9)
    age(store)
    collect(store, wanted)
    assert store.verify() == []
    assert [str(artifact.ref) for artifact in store.list()] == ["acme/alive@1.0", "acme/tone@1.0", "acme/tone@1.2"]
    assert not store.blobs.has(dead.digest)
    assert again.file("adapter_model.safetensors").exists()


def test_collectors_and_publishers_at_once(store: Store, packed, tmp_path: Path) -> None:
    """Without any grace: what a publisher relies on may vanish under its hands, and it has to notice."""
    directories = [packed(f"acme/m{i}@1.0", seed=i % 2)[0] for i in range(8)]
    for directory in directories[:4]:  # bytes that nobody names, and that the others are going to rely on
        ref = store.put(directory).ref
        store.delete(ref, "no")
    stop = threading.Event()
    errors: list[BaseException] = []

    def collector() -> None:
        mine = Store(store.root)
        try:
            while not stop.is_set():
                collect(mine, plan(mine, grace=0), grace=0)
                time.sleep(0.005)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=collector)
    thread.start()
    source = Store(tmp_path / "source")
    for directory in directories[4:]:
        source.put(directory)
        push(source, from_url(str(tmp_path / "remote")), source.list()[-1].ref)
    for artifact in source.list():
        pull(Store(store.root), from_url(str(tmp_path / "remote")), artifact.ref)
    stop.set()
    thread.join()
    assert errors == []
    assert len(store.list()) == 4
    assert store.verify() == []


def test_hub_gc(store: Store, publish, monkeypatch) -> None:
    monkeypatch.setenv("HUB_HOME", str(store.root))
    artifact = publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)

    def run(*arguments: str):
        result = CliRunner().invoke(main, ["gc", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    assert "add --run" in run("--superseded").stderr
    shown = json.loads(run("--superseded", "--grace", "0", "--json").stdout)
    assert shown["releases"] == ["acme/tone@1.0"]
    assert artifact.digest in shown["blobs"]
    assert store.get("acme/tone@1.0") == artifact
    assert run("--superseded", "--grace", "0", "--run").stdout == "acme/tone@1.0\n"
    assert [str(found.ref) for found in store.list(yanked=True)] == ["acme/tone@1.1"]
    assert json.loads(run("--grace", "0", "--json").stdout)["bytes"] == 0
