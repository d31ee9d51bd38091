import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hub.errors import Conflict, IntegrityError, NotFound, RefError, UsageError
from hub.storage.vault import Vault
from hub.store import ABSENT, Store, default_root


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_put_get_and_files(store: Store, packed) -> None:
    directory, manifest = packed("acme/tone@1.0.0")
    artifact = store.put(directory)
    assert str(artifact.ref) == "acme/tone@1.0.0"
    assert artifact.digest == manifest.digest
    assert artifact.manifest == manifest
    assert artifact.files == ("README.md", "adapter_config.json", "adapter_model.safetensors")
    for name in artifact.files:
        assert artifact.file(name).read_bytes() == (directory / name).read_bytes()
    assert artifact.read("README.md") == (directory / "README.md").read_bytes()
    assert store.verify() == []


def test_reading_an_absent_store_makes_nothing(store: Store) -> None:
    assert store.list() == []
    assert store.names() == []
    assert store.verify() == []
    with pytest.raises(NotFound):
        store.get("tone")
    assert not store.root.exists()


def test_put_is_idempotent(store: Store, packed) -> None:
    directory, _ = packed()
    first = store.put(directory)
    before = tree(store.root)
    assert store.put(directory) == first
    after = tree(store.root)
    assert {k: v for k, v in after.items() if "index.sqlite" not in k} == {
        k: v for k, v in before.items() if "index.sqlite" not in k
    }
    assert len(store.list()) == 1


def test_idempotent_put_still_checks_the_directory(store: Store, packed) -> None:
    directory, _ = packed()
    store.put(directory)
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace("8", "800"))
    with pytest.raises(IntegrityError, match="adapter_config"):
        store.put(directory)
    assert store.verify() == []


def test_other_content_under_a_published_version_is_a_conflict(store: Store, packed) -> None:
    first = store.put(packed(seed=0)[0])
    with pytest.raises(Conflict, match="versions are immutable") as caught:
        store.put(packed(seed=1)[0])
    assert caught.value.digest == first.digest
    with pytest.raises(Conflict):
        store.put(packed("acme/tone@1.0", seed=2)[0])  # 1.0 is 1.0.0
    assert store.get("acme/tone").digest == first.digest


@pytest.mark.parametrize(
    ("ref", "version"),
    [("acme/tone", "2.0.0"), ("acme/tone@1.0.0", "1.0.0"), ("acme/tone>=1,<2", "1.5.0"), ("acme/tone@prod", "1.5.0")],
)
def test_get_by_any_ref(store: Store, publish, ref: str, version: str) -> None:
    for other in ("1.0.0", "1.5.0", "2.0.0"):
        publish(f"acme/tone@{other}")
    store.tag("acme/tone@1.5.0", "prod")
    artifact = store.get(ref)
    assert artifact.ref.version == version
    assert store.get(str(artifact.ref.at(digest=artifact.digest))) == artifact


def test_not_found_suggests_a_name(store: Store, publish) -> None:
    publish("acme/tone@1.0")
    with pytest.raises(NotFound) as caught:
        store.get("acme/tonne")
    assert caught.value.hint == "did you mean acme/tone?"
    with pytest.raises(NotFound) as caught:
        store.get("tone")  # local/tone
    assert caught.value.hint == "did you mean acme/tone?"
    with pytest.raises(NotFound) as caught:
        store.get("acme/tone").file("adapter_confg.json")
    assert caught.value.hint == "did you mean adapter_config.json?"


def test_alias_compare_and_swap(store: Store, publish) -> None:
    one, two = publish("acme/tone@1.0"), publish("acme/tone@2.0", seed=1)
    assert store.tag("acme/tone@1.0", "prod", expect=ABSENT) == one
    for wrong in (ABSENT, "2.0", two.digest, "3.0"):
        with pytest.raises(Conflict, match=r"stands at 1\.0"):
            store.tag("acme/tone@2.0", "prod", expect=wrong)
    assert store.get("acme/tone@prod") == one
    assert store.tag("acme/tone@2.0", "prod", expect="1.0.0") == two
    assert store.tag("acme/tone@1.0", "prod", expect=two.digest) == one
    assert store.tag("acme/tone@2.0", "prod") == two  # without an expectation it moves from anywhere
    assert two.facts.aliases == ()  # facts are of the time they were read
    assert store.get("acme/tone@2.0").facts.aliases == ("prod",)
    assert store.untag("acme/tone", "prod", expect="2.0") == two.digest
    with pytest.raises(NotFound):
        store.get("acme/tone@prod")
    with pytest.raises(NotFound):
        store.untag("acme/tone", "prod")


def test_one_of_many_swaps_wins(store: Store, publish) -> None:
    for i in range(8):
        publish(f"acme/tone@1.{i}", seed=i)
    store.tag("acme/tone@1.0", "prod")

    def swap(i: int) -> bool:
        try:
            Store(store.root).tag(f"acme/tone@1.{i}", "prod", expect="1.0")
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(7) as pool:
        wins = list(pool.map(swap, range(1, 8)))
    assert sum(wins) == 1
    assert store.get("acme/tone@prod").ref.version == f"1.{wins.index(True) + 1}"


def test_bad_aliases(store: Store, publish) -> None:
    publish("acme/tone@1.0")
    for alias in ("1.0", "v2", "", "-x", "../x", "A"):
        with pytest.raises(RefError):
            store.tag("acme/tone", alias)
    with pytest.raises(UsageError, match="computed"):
        store.tag("acme/tone", "latest")


def test_yank(store: Store, publish) -> None:
    publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    from hub.ref import AdapterRef

    store.yank(AdapterRef.parse("acme/tone@1.1"), "leaks names")
    assert store.get("acme/tone").ref.version == "1.0"
    assert store.get("acme/tone@1.1").facts.yanked == "leaks names"
    assert [a.ref.version for a in store.list()] == ["1.0"]
    assert [a.ref.version for a in store.list(yanked=True)] == ["1.0", "1.1"]
    assert [a.ref.version for a in store.list(newest=True)] == ["1.0"]
    store.yank(AdapterRef.parse("acme/tone@1.1"), None)
    assert store.get("acme/tone").ref.version == "1.1"


def test_materialize(store: Store, publish, tmp_path: Path) -> None:
    artifact = publish()
    out = artifact.materialize(tmp_path / "deep" / "out")
    assert set(tree(out)) == {*artifact.files, "module.json"}
    assert (out / "module.json").read_bytes() == artifact.manifest.canonical
    assert Store(tmp_path / "second").put(out) == artifact  # a materialized directory is an artifact directory
    assert artifact.materialize(out) == out  # unchanged: nothing to do
    (out / "README.md").write_text("edited")
    with pytest.raises(Conflict, match="but changed"):
        artifact.materialize(out)
    assert (out / "README.md").read_text() == "edited"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert set(tree(artifact.materialize(empty))) == {*artifact.files, "module.json"}


def test_materialize_refuses_what_it_would_overwrite(store: Store, publish, tmp_path: Path) -> None:
    artifact = publish()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(Conflict):
            artifact.materialize(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_materialized_file_can_be_edited_without_harm(store: Store, publish, tmp_path: Path) -> None:
    artifact = publish()
    out = artifact.materialize(tmp_path / "out")
    with (out / "adapter_config.json").open("a") as file:
        file.write(" ")
    assert store.verify() == []


def blob(store: Store, name: str = "adapter_model.safetensors") -> Path:
    artifact = store.list()[0]
    return store.blobs.path(artifact.manifest.file(name).digest)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "grow"])
def test_damage_is_found_and_mended(store: Store, packed, tmp_path: Path, damage: str) -> None:
    directory, _ = packed()
    artifact = store.put(directory)
    path = blob(store)
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-9]), "grow": bytes(data) + b"x"}[damage])
    problems = store.verify()
    assert len(problems) == 1
    assert "adapter_model.safetensors" in str(problems[0])
    assert store.verify("acme/tone") == problems
    for use in (lambda: artifact.file("adapter_model.safetensors"), lambda: artifact.materialize(tmp_path / "out")):
        with pytest.raises(IntegrityError, match="adapter_model"):
            use()
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    store.put(directory)  # publishing the same bytes again mends the store
    assert store.verify() == []
    artifact.materialize(tmp_path / "out")


def test_a_file_damaged_after_its_first_check_is_caught(store: Store, publish) -> None:
    artifact = publish()
    path = artifact.file("adapter_model.safetensors")
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        artifact.file("adapter_model.safetensors")


def test_a_damaged_manifest_blob(store: Store, publish) -> None:
    artifact = publish()
    path = store.blobs.path(artifact.digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"lora", b"ia3_"))
    with pytest.raises(IntegrityError):
        _ = store.get("acme/tone").manifest
    assert len(store.verify()) == 1
    publish()  # the same bytes again
    assert store.verify() == []
    assert store.get("acme/tone").manifest == artifact.manifest


def test_a_changed_log_is_found(store: Store, publish) -> None:
    publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    log = store.ledger.path
    log.write_bytes(log.read_bytes().replace(b'"1.0"', b'"1.2"'))
    assert [problem.about for problem in store.verify()][-1] == "log.jsonl"


def everything(store: Store, publish) -> None:
    publish("acme/tone@1.0", task="chat", labels=("a", "b"), summary="A tone of voice", languages=("en",))
    publish("acme/tone@1.10", seed=1, requires=({"name": "acme/b", "range": ">=1"},))
    publish("acme/tone@1.9", seed=2, lineage={"parents": ["acme/tone@1.0"]})
    publish("zeta/other@1.0", metrics=({"dataset": "d", "metric": "accuracy", "value": 0.5},), kind="ia3")
    store.tag("acme/tone@1.0", "prod")
    store.tag("acme/tone@1.9", "prod")
    store.tag("acme/tone@1.0", "old")
    store.untag("acme/tone", "old")
    from hub.ref import AdapterRef

    store.yank(AdapterRef.parse("acme/tone@1.10"), "bad")


def test_a_rebuilt_index_equals_the_original(store: Store, publish) -> None:
    everything(store, publish)
    original, index_json = store._index.dump(), (store.root / "index.json").read_bytes()
    store._index.remove()
    (store.root / "index.json").unlink()
    assert store.rebuild_index() == 4
    assert store._index.dump() == original
    assert (store.root / "index.json").read_bytes() == index_json
    assert store.rebuild_index() == 4
    assert store._index.dump() == original


@pytest.mark.parametrize("harm", ["removed", "garbage", "old schema", "behind"])
def test_an_index_heals_itself(store: Store, publish, harm: str) -> None:
    publish("acme/tone@1.0")
    early = (store.root / "index.sqlite").read_bytes()
    everything_else = publish("acme/tone@2.0", seed=1)
    good = Store(store.root)._index.dump()
    path = store.root / "index.sqlite"
    if harm == "removed":
        path.unlink()
    elif harm == "garbage":
        path.write_bytes(b"garbage" * 1000)
    elif harm == "behind":
        path.write_bytes(early)
    else:
        with store._index.connect() as db:
            db.execute("PRAGMA user_version = 999")
    assert Store(store.root).get("acme/tone") == everything_else
    assert Store(store.root)._index.dump() == good


def test_a_store_is_an_oci_layout(store: Store, publish) -> None:
    import hashlib

    everything(store, publish)
    assert json.loads((store.root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.root / "index.json").read_bytes())
    tags = {m["annotations"]["org.opencontainers.image.ref.name"]: m for m in index["manifests"]}
    assert set(tags) == {"acme/tone:1.0", "acme/tone:1.10", "acme/tone:1.9", "acme/tone:prod", "zeta/other:1.0"}
    assert tags["acme/tone:prod"]["digest"] == tags["acme/tone:1.9"]["digest"]
    for entry in index["manifests"]:
        for described in [entry, *_parts(store, entry)]:
            data = store.blobs.path(described["digest"]).read_bytes()
            assert len(data) == described["size"]
            assert described["digest"] == "sha256:" + hashlib.sha256(data).hexdigest()


def _parts(store: Store, entry: dict) -> list[dict]:
    image = json.loads(store.blobs.path(entry["digest"]).read_bytes())
    return [image["config"], *image["layers"]]


def test_nothing_temporary_stays(store: Store, publish, packed) -> None:
    publish()
    with pytest.raises(Conflict):
        publish(seed=1)
    assert list((store.root / "tmp").iterdir()) == []
    assert list((store.root / "partial").iterdir()) == []


def test_a_dead_processs_room_is_swept_and_its_bytes_kept(store: Store, publish) -> None:
    publish()
    dead = store.root / "tmp" / "0123456789abcdef"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / ("a" * 64 + ".part")).write_bytes(b"half a blob")
    (dead / "copy").write_bytes(b"x")
    with Store(store.root).staging.room():  # as the next process does
        assert not dead.exists()
    assert (store.root / "partial" / ("a" * 64)).read_bytes() == b"half a blob"


def test_a_living_processs_room_is_left_alone(store: Store, publish) -> None:
    publish()
    with store.staging.room() as room:
        (room / "mine").write_bytes(b"x")
        publish("acme/tone@2.0", seed=1)
        assert (room / "mine").read_bytes() == b"x"
    assert not room.exists()


def test_hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "elsewhere"))
    assert Store().root == tmp_path / "elsewhere"
    monkeypatch.delenv("HUB_HOME")
    assert default_root() == Path.home() / ".moduloom"


def test_a_moved_store_is_the_same_store(store: Store, publish, tmp_path: Path) -> None:
    artifact = publish()
    shutil.move(store.root, tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    assert moved.get("acme/tone") == artifact
    assert moved.verify() == []


WORKER = """
import sys
from pathlib import Path
from hub.errors import Conflict
from hub.ref import AdapterRef
from hub.store import Store
root, me, *directories = sys.argv[1:]
store = Store(root)
for turn, directory in enumerate(directories):
    artifact = store.put(directory)
    store.tag(artifact.ref, f"by{chr(97 + int(me))}")
    assert artifact in store.list()
    assert store.get(artifact.ref) == artifact
"""


def test_eight_processes_on_one_store(store: Store, packed) -> None:
    # All put the same shared artifacts and some of their own, at once, into a store that is not there yet.
    shared = [str(packed(f"acme/shared@1.{i}", seed=i)[0]) for i in range(2)]
    own = [[str(packed(f"acme/own{w}@1.{i}", seed=10 * w + i)[0]) for i in range(2)] for w in range(8)]
    command = [sys.executable, "-c", WORKER, str(store.root)]
    workers = [
        subprocess.Popen([*command, str(w), *shared, *own[w]], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        for w in range(8)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert len(store.list()) == 2 + 16
    assert sum(len(store.catalogue(name).aliases) for name in store.names()) == 8 * 2
    assert store.verify() == []
    assert list((store.root / "tmp").iterdir()) == []


def test_names_are_compared_without_case(store: Store, packed) -> None:
    store.put(packed("Acme/my_Tone@1.0")[0])
    other = packed("acme/My_tone@1.0", summary="other")[0]
    with pytest.raises(Conflict, match=r"published in .* with other content"):
        store.put(other)
    store.put(packed("acme/my_tone@1.1")[0])
    store.put(packed("acme/myxtone@1.0")[0])
    base = packed("org/Mix@1.0", type="composition", kind="", expression="a", requires=[{"name": "acme/My_Tone"}])[0]
    store.put(base)
    for again in (store, Store(store.root)):
        assert [str(again.get(ref).ref) for ref in ("ACME/my_tone@1.0", "acme/MY_TONE", "acme/my_tone>=1,<1.1")] == [
            "Acme/my_Tone@1.0",
            "acme/my_tone@1.1",
            "Acme/my_Tone@1.0",
        ]
        assert again.names() == Vault(store.root).names() == ["acme/my_tone", "acme/myxtone", "org/Mix"]
        for wanted in ({"name": "My_Tone"}, {"name": "acme/MY_*"}, {"name": "Acme/My_Tone"}):
            assert [artifact.ref.version for artifact in again.list(**wanted)] == ["1.0", "1.1"], wanted
        assert len(again.list(namespace="ACME")) == 3
        assert [str(artifact.ref) for artifact in again.search("MY_Tone")] == ["acme/my_tone@1.1"]
        again.rebuild_index()
    store.tag("acme/my_tone@1.0", "prod")
    assert store.catalogue("Acme/My_Tone").aliases == Vault(store.root).catalogue("ACME/MY_TONE").aliases
    with pytest.raises(Conflict, match="required by org/Mix"):
        store.delete("ACME/MY_TONE@1.1", "no")
    assert str(store.untag("Acme/My_tone", "prod")) == store.get("acme/my_tone@1.0").digest
    store.delete("ACME/MY_TONE@1.1", "wrong", force=True)
    assert store.get("acme/my_tone").ref.version == "1.0"
    listed = json.loads((store.root / "index.json").read_bytes())["manifests"]
    tags = [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in listed]
    assert sorted(tags) == ["Acme/my_Tone:1.0", "acme/myxtone:1.0", "org/Mix:1.0"]
    assert store.verify() == []
    with pytest.raises(Conflict, match="never used again"):
        store.put(packed("Acme/MY_tone@1.1")[0])
