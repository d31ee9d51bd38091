"""Named attacks on what is pushed and pulled: each must be refused by an error that says what and where."""

import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hub.errors import GateError, HubError, IntegrityError, ManifestError, NotFound
from hub.io import canonical_json as canonical
from hub.io.files import check_relative
from hub.manifest import Draft, Manifest
from hub.pack import pack
from hub.remotes import from_url
from hub.storage.ledger import Event, Ledger
from hub.store import Store
from hub.transfer import pull, push

DRAFT = Draft(name="acme/tone", version="2.0.0", kind="lora")


class Boom:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "pytorch_model.PT",
        "optimizer.pt",
        "training_args.bin",
        "x.pkl",
        "a.npy",
        "m.ckpt",
        "x.joblib",
    ],
)
def test_pickles_by_name(victim, tmp_path: Path, name: str) -> None:
    directory = victim()
    (directory / name).write_bytes(pickle.dumps(Boom(tmp_path / "boom")))
    with pytest.raises(GateError, match="pickle") as caught:
        pack(directory, DRAFT)
    assert "safetensors" in caught.value.hint
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["notes.md", "vocab.json", "adapter_config.json", "aux/stats.txt", "plot.png"])
def test_pickles_under_another_name(victim, tmp_path: Path, name: str, protocol: int) -> None:
    directory = victim()
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(pickle.dumps(Boom(tmp_path / "boom"), protocol=protocol))
    with pytest.raises(GateError, match="pickle"):
        pack(directory, DRAFT)
    assert not (tmp_path / "boom").exists()


def test_a_pickle_called_safetensors(victim) -> None:
    directory = victim()
    (directory / "adapter_model.safetensors").write_bytes(pickle.dumps({"w": [1.0] * 100}))
    with pytest.raises((GateError, IntegrityError), match="adapter_model"):
        pack(directory, DRAFT)


def test_a_zip_called_json(victim) -> None:
    directory = victim()
    with zipfile.ZipFile(directory / "vocab.json", "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(GateError, match="pickle or an archive"):
        pack(directory, DRAFT)


@pytest.mark.parametrize(
    "name", ["run.py", "setup.sh", "lib.so", "weights.h5", "a.zip", "model.onnx", "noextension", "x.html"]
)
def test_files_that_no_artifact_holds(victim, name: str) -> None:
    directory = victim()
    (directory / name).write_text("x")
    with pytest.raises(GateError) as caught:
        pack(directory, DRAFT)
    assert name in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xfe text", b"a\0b", b"\xc3"])
def test_text_that_is_none(victim, data: bytes) -> None:
    directory = victim()
    (directory / "README.md").write_bytes(data)
    with pytest.raises(GateError, match="README"):
        pack(directory, DRAFT)


@pytest.mark.parametrize("name", ["README.md", "aux", "adapter_model.safetensors"])
def test_symbolic_links(victim, tmp_path: Path, name: str) -> None:
    directory = victim()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id.txt").write_text("private")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(secret if name == "aux" else secret / "id.txt")
    for attack in (lambda: pack(directory, DRAFT), lambda: Store(tmp_path / "s").put(directory)):
        with pytest.raises(GateError, match="symbolic link"):
            attack()


def test_a_pipe_does_not_hang(victim) -> None:
    directory = victim()
    os.mkfifo(directory / "notes.txt")
    with pytest.raises(GateError, match="not a regular file"):
        pack(directory, DRAFT)


def test_a_socket(victim, monkeypatch) -> None:
    directory = victim()
    monkeypatch.chdir(directory)  # the path of a socket is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("notes.txt")
        with pytest.raises(GateError, match="not a regular file"):
            pack(directory, DRAFT)


def test_too_many_and_too_deep(victim, monkeypatch) -> None:
    directory = victim()
    monkeypatch.setattr("hub.io.files.MAX_FILES", 10)
    for i in range(11):
        (directory / f"{i}.txt").touch()
    with pytest.raises(GateError, match="more than 10 files"):
        pack(directory, DRAFT)
    deep = victim("acme/deep@1.0")
    for _ in range(40):
        deep = deep / "d"
        deep.mkdir()
    (deep / "x.txt").touch()
    with pytest.raises(GateError, match="levels deep"):
        pack(deep.parents[39], DRAFT)


@pytest.mark.parametrize(
    "path",
    [
        "../x.txt",
        "a/../../x.txt",
        "/etc/passwd",
        "a//b.txt",
        "./a.txt",
        "a/./b.txt",
        "",
        "a\\..\\b.txt",
        "C:/x.txt",
        "a:b.txt",
        "a\0.txt",
        "a\n.txt",
        ".hidden",
        "a/.ssh/id.txt",
        "x.",
        "x ",
        "~/x.txt",
        "a" * 129,
        "a/b/c/d/e/f/g.txt",
        "ａ.txt",  # a full-width letter
        "a\u202etxt.md",  # writes backwards from here
    ],
)
def test_path_escapes(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_relative(path)


@given(st.text(max_size=30))
def test_accepted_paths_stay_inside(path: str) -> None:
    try:
        check_relative(path)
    except ValueError:
        return
    root = Path("/srv/root")
    assert os.path.normpath(root / path) == str(root / path)
    assert (root / path).is_relative_to(root)


def rewrite(directory: Path, edit: Callable[[dict], object]) -> bytes:
    """Edit module.json; gives its canonical bytes."""
    document = json.loads((directory / "module.json").read_bytes())
    edit(document)
    data = canonical.dumps(document)
    (directory / "module.json").write_bytes(data)
    return data


ESCAPES = ["../../outside.txt", "/tmp/outside.txt", "a/../../outside.txt"]


@pytest.mark.parametrize("path", ESCAPES)
def test_a_manifest_that_points_outside(victim, store: Store, tmp_path: Path, path: str) -> None:
    directory = victim()
    (tmp_path / "outside.txt").write_text("mine")
    rewrite(directory, lambda m: m["files"][0].update(path=path))
    with pytest.raises(ManifestError, match=r"files\[0\]\.path"):
        store.put(directory)
    assert store.list() == []


@pytest.mark.parametrize("digest", ["../../../etc/passwd", "sha256:../../x", "sha256:" + "g" * 64, "md5:abc", ""])
def test_a_digest_never_becomes_a_path(store: Store, digest: str) -> None:
    with pytest.raises(HubError, match="not a digest"):
        store.blobs.path(digest)


def publish_raw(
    root: Path, manifest: bytes, blobs: list[bytes], *, name: str = "acme/tone", version: str = "1.0.0"
) -> str:
    """Write a remote by hand, past all gates, as an attacker would."""
    remote = Store(root)
    remote.create()
    with remote.staging.room() as room:
        for data in blobs:
            remote.blobs.add(data, room)
        digest = remote.blobs.add(manifest, room)
    ledger = Ledger(root / "log.jsonl")
    ledger.append(Event("publish", "acme/tone", digest, version="1.0.0"), ledger.end())
    return digest


def forged(victim, edit: Callable[[dict], object], **files: bytes) -> tuple[bytes, list[bytes]]:
    """A manifest edited to fit changed files: every digest in it is right."""
    directory = victim()
    document = json.loads((directory / "module.json").read_bytes())
    contents = {entry["path"]: (directory / entry["path"]).read_bytes() for entry in document["files"]}
    for key, data in files.items():
        contents[{"weights": "adapter_model.safetensors", "card": "README.md"}[key]] = data
    for entry in document["files"]:
        data = contents[entry["path"]]
        entry.update(sha256=canonical.digest(data).removeprefix("sha256:"), size=len(data))
    edit(document)
    return canonical.dumps(document), list(contents.values())


def safetensors_of(tmp_path: Path, **tensors: np.ndarray) -> bytes:
    save_file(tensors, tmp_path / "forged.safetensors")
    return (tmp_path / "forged.safetensors").read_bytes()


def keep(document: dict) -> None:
    """Edit nothing."""


def test_forged_nan_is_refused_at_pull(victim, store: Store, tmp_path: Path) -> None:
    """The digests all fit, so only the gates of the pulling side stand between this and the store."""
    weights = safetensors_of(tmp_path, w=np.array([np.nan], np.float32))
    publish_raw(tmp_path / "remote", *forged(victim, keep, weights=weights))
    with pytest.raises(GateError, match="w holds 1 NaN"):
        pull(store, from_url(str(tmp_path / "remote")), "acme/tone")
    assert store.list() == []


@pytest.mark.parametrize(
    ("files", "edit", "error", "words"),
    [
        ({"card": b"\x80\x04."}, keep, GateError, "pickle"),
        ({"card": b"\xff\xff"}, keep, GateError, "not UTF-8"),
        ({"weights": b"\x80\x04\x95" + b"x" * 50}, keep, HubError, "adapter_model"),
        ({"weights": (2**60).to_bytes(8, "little") + b"{}"}, keep, GateError, "announces a header"),
        ({}, lambda m: m["files"][0].update(path="evil.bin"), ManifestError, "not sorted"),
        ({}, lambda m: m["files"][-1].update(path="weights.bin"), GateError, "pickle"),
        ({}, lambda m: m["files"][0].update(path="../../x.md"), ManifestError, "files"),
        ({}, lambda m: m["tensors"].pop(), GateError, "has extra 1 tensors"),
        ({}, lambda m: m["tensors"].append({**m["tensors"][0], "name": "zz"}), GateError, "misses 1"),
        ({}, lambda m: m.update(tensors_digest="sha256:" + "0" * 64), IntegrityError, "tensors_digest"),
        ({}, lambda m: m.update(name="acme/other"), IntegrityError, "under the name"),
        ({}, lambda m: m.update(version="6.6.6"), IntegrityError, "under the name"),
        ({}, lambda m: m.update(unknown=1), ManifestError, "unknown"),
        ({}, lambda m: m["files"][0].update(size=2**50), ManifestError, "size"),
        ({}, lambda m: m["files"][0].update(size=m["files"][0]["size"] + 1), IntegrityError, "truncated"),
        ({}, lambda m: m["files"][0].update(size=m["files"][0]["size"] - 1), IntegrityError, "more bytes"),
        ({}, lambda m: m["files"][0].update(sha256="0" * 64), NotFound, "has lost"),
    ],
)
def test_forged_artifacts(victim, store: Store, tmp_path: Path, files, edit, error, words: str) -> None:
    publish_raw(tmp_path / "remote", *forged(victim, edit, **files))
    with pytest.raises(error, match=words):
        pull(store, from_url(str(tmp_path / "remote")), "acme/tone")
    assert store.list() == []
    assert store.verify() == []
    assert not (tmp_path / "x.md").exists()


def test_every_flipped_byte_is_caught_at_pull(victim, store: Store, tmp_path: Path) -> None:
    """Each byte of each blob of a small artifact, flipped in turn, on the remote."""
    store.put(victim(size=200))
    remote = from_url(str(tmp_path / "remote"))
    push(store, remote, "acme/tone")
    second = Store(tmp_path / "second")
    blobs = Store(tmp_path / "remote").blobs
    manifest = store.get("acme/tone").manifest
    caught = 0
    for digest in (manifest.digest, *(entry.digest for entry in manifest.files)):
        path = blobs.path(digest)
        path.chmod(0o644)
        good = path.read_bytes()
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            entry = next((e for e in manifest.files if e.digest == digest), None)
            with pytest.raises(HubError):
                if entry is None:
                    pull(second, remote, "acme/tone")
                else:
                    with second.staging.room() as room:
                        read = lambda offset, e=entry: remote.read(manifest, e, offset)  # noqa: E731
                        second.staging.receive(entry, room / "blob", read, lambda count: None)
            caught += 1
        path.write_bytes(good)
    assert caught == len(manifest.canonical) + manifest.size
    assert second.list() == []
    assert pull(second, remote, "acme/tone").digest == manifest.digest


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edit=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    ),
    field=st.sampled_from(sorted(Manifest.model_fields)),
)
def test_any_value_in_any_field_gives_a_manifest_or_a_manifest_error(manifest_document, edit, field: str) -> None:
    document = {**manifest_document, field: edit}
    try:
        manifest = Manifest.parse(json.dumps(document).encode())
    except ManifestError as error:
        assert str(error)
    else:
        assert Manifest.parse(manifest.canonical).digest == manifest.digest


@pytest.fixture
def manifest_document(victim) -> dict:
    return json.loads((victim() / "module.json").read_bytes())
