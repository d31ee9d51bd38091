"""A scan that follows its writer gives what a scan afterwards gives, or nothing."""

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.contents import scan_while_writing as following
from hub.contents.tensor_files import scan
from hub.errors import GateError, IntegrityError
from hub.manifest import FileEntry
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LARGE", 1)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path, random = tmp_path / "adapter_model.safetensors", np.random.default_rng(0)
    tensors = {f"t{i}": random.normal(size=(i + 1, 7)).astype(np.float32) for i in range(9)}
    tensors["b"] = np.arange(5, dtype=np.int8)
    save_file(tensors, path)
    return path


def entry_of(path: Path) -> FileEntry:
    found = scan(path)
    return FileEntry(path=path.name, sha256=found.sha256, size=found.size, role="weights")


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
def test_the_same_as_afterwards(weights: Path, tmp_path: Path, piece: int) -> None:
    data, grown = weights.read_bytes(), tmp_path / "grown"
    with following.following(grown, entry_of(weights)) as follower, grown.open("wb") as file:
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])
            file.flush()
    assert follower.scan == scan(weights)


def test_nothing_is_found_in_what_is_short_long_or_another_file(weights: Path, tmp_path: Path) -> None:
    data, entry, grown = weights.read_bytes(), entry_of(weights), tmp_path / "grown"
    for wrong in (data[:-1], data + b"x", b"", b"junk"):
        with following.following(grown, entry) as follower:
            grown.write_bytes(wrong)
        assert follower.scan is None


def test_another_file_of_the_same_name_is_not_the_one_that_was_read(weights: Path, tmp_path: Path) -> None:
    grown, data = tmp_path / "grown", weights.read_bytes()
    with following.following(grown, entry_of(weights)) as follower:
        grown.write_bytes(data)
        follower._thread.join(20)
        assert follower.scan is not None
        (tmp_path / "other").write_bytes(data[:-1] + b"x")
        (tmp_path / "other").replace(grown)
    assert follower.scan is None


def test_it_ends_with_its_writer(weights: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    for written in (b"", weights.read_bytes()[:200]):
        with (
            pytest.raises(OSError, match="no more"),
            following.following(tmp_path / f"cut-{len(written)}", entry_of(weights)) as follower,
        ):
            (tmp_path / f"cut-{len(written)}").write_bytes(written)
            raise OSError("no more")
        assert follower.scan is None
    assert threading.active_count() == before


def test_every_flipped_byte_is_noticed_while_it_arrives(store: Store, packed, tmp_path: Path) -> None:
    """As `test_byte_flips`, over the path that large files take."""
    artifact = store.put(packed()[0])
    remote = from_url(str(tmp_path / "remote"))
    push(store, remote, "acme/tone")
    entry = artifact.manifest.file("adapter_model.safetensors")
    path = Store(tmp_path / "remote").blobs.path(entry.digest)
    path.chmod(0o644)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises((IntegrityError, GateError)):
            pull(Store(tmp_path / "mine"), remote, "acme/tone")
        assert Store(tmp_path / "mine").list() == []
    path.write_bytes(data)
    assert pull(Store(tmp_path / "mine"), remote, "acme/tone") == artifact
    assert Store(tmp_path / "mine").verify() == []
