"""Every byte of a small artifact, flipped in turn where the remote keeps it: a pull notices each.

The bytes are those that a pull reads: the files, the manifest, and of an OCI registry the image manifest. The runs by
default try all of them on a directory and in memory, and a part of them on servers; the slow ones try all on all.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.errors import HubError
from hub.io.canonical_json import digest as digest_of
from hub.manifest import Draft
from hub.pack import pack
from hub.remotes import from_url
from hub.storage.oci import image_manifest
from hub.store import Store
from hub.transfer import pull, push

MEMORY = Path("/dev/shm")  # fsync costs nothing there


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as directory:
        yield Path(directory)


@pytest.fixture
def tiny(place: Path):
    """An artifact of some 850 bytes in a store of its own."""
    directory = place / "tiny"
    directory.mkdir()
    save_file({"a.lora_A.weight": np.array([[0.5, -2.0]], np.float32)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    (directory / "README.md").write_text("#\n")
    pack(directory, Draft(name="acme/tiny", version="1.0", kind="lora"))
    return Store(place / "source").put(directory)


Put = Callable[[str, bytes], None]


def in_directory(root: Path, path: Callable[[str], Path]) -> Put:
    def put(digest: str, data: bytes) -> None:
        where = path(digest)
        where.chmod(0o644)
        where.write_bytes(data)

    return put


def in_blobs(blobs: Path) -> Put:
    return in_directory(blobs, lambda digest: blobs / digest.removeprefix("sha256:"))


def in_fsspec(url: str) -> Put:
    import fsspec

    fs, root = fsspec.url_to_fs(url)
    return lambda digest, data: fs.pipe_file(f"{root}/blobs/sha256/{digest.removeprefix('sha256:')}", data)


def in_registry(blobs: Path) -> Put:
    def path(digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return blobs / name[:2] / name / "data"

    return in_directory(blobs, path)


def flip_all(artifact, url: str, put: Put, place: Path, stride: int, forget: Callable[[], None] = lambda: None) -> int:
    """Flip every `stride`-th byte; returns how many were tried."""
    source = Store(place / "source")
    push(source, from_url(url), artifact.ref)
    kept = {entry.digest: source.blobs.read(entry.digest) for entry in artifact.manifest.files}
    kept[artifact.digest] = artifact.manifest.canonical
    if url.startswith("oci://"):
        image = image_manifest(artifact.manifest.canonical)
        kept[digest_of(image)] = image
    tried, unnoticed = 0, []
    for digest, data in kept.items():
        for i in range(tried % stride, len(data), stride):
            flipped = bytearray(data)
            flipped[i] ^= 1 << (i % 8)
            put(digest, bytes(flipped))
            forget()
            tried += 1
            try:
                pull(Store(place / "mine"), from_url(url), artifact.ref)
                unnoticed.append((digest, i))
            except HubError:
                pass
            assert Store(place / "mine").list() == []
            shutil.rmtree(place / "mine", ignore_errors=True)
        put(digest, data)
    forget()
    assert unnoticed == []
    assert pull(Store(place / "mine"), from_url(url), artifact.ref) == artifact
    return tried


@contextmanager
def hub_protocol(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Our registry over the store `place / "remote"`; the client's cache is `place / "cache"`."""
    import socket
    import threading
    import time

    pytest.importorskip("fastapi", reason="the extra `server` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
    from huggingface_hub import constants

    from hub.registry.app import create_app

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    server = uvicorn.Server(uvicorn.Config(create_app(Store(place / "remote")), log_level="critical"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"hf+http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


STRIDES = [pytest.param(23, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def test_directory(tiny, place: Path) -> None:
    blobs = place / "remote" / "blobs" / "sha256"
    assert flip_all(tiny, str(place / "remote"), in_blobs(blobs), place, 1) >= 800


def test_memory(tiny, place: Path) -> None:
    url = f"memory://flips-{place.name}"
    assert flip_all(tiny, url, in_fsspec(url), place, 1) >= 800


@pytest.mark.parametrize("stride", STRIDES)
def test_s3(tiny, place: Path, s3_url: str, stride: int) -> None:
    assert flip_all(tiny, s3_url, in_fsspec(s3_url), place, stride) >= 800 // stride


@pytest.mark.parametrize("stride", STRIDES)
def test_oci(tiny, place: Path, oci_server: tuple[str, Path], oci_url: str, stride: int) -> None:
    assert flip_all(tiny, oci_url, in_registry(oci_server[1]), place, stride) >= 1500 // stride


@pytest.mark.parametrize("stride", STRIDES)
def test_hugging_face(tiny, place: Path, monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    with hub_protocol(place, monkeypatch) as url:
        blobs = place / "remote" / "blobs" / "sha256"
        forget = lambda: shutil.rmtree(place / "cache", ignore_errors=True)  # noqa: E731
        assert flip_all(tiny, url, in_blobs(blobs), place, stride, forget) >= 800 // stride
