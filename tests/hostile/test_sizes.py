"""Sizes that are claimed, not backed: refused before anything of that size is allocated or read."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hub.cli import _row_of
from hub.contents.checks import inspect
from hub.contents.tensor_files import read_header, scan
from hub.errors import HubError
from hub.foreign.peft_config import facts_of
from hub.foreign.sources import find
from hub.io.files import read_capped
from hub.manifest import MAX_TENSORS, Manifest
from hub.signing import check
from hub.store import Store

MIB = 2**20


@contextmanager
def refused(words: str, *, most: int = 8 * MIB) -> Iterator[None]:
    """The block raises a HubError with a hint and these words, and allocates at most so many bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(HubError) as caught:
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    row = _row_of(caught.value)
    assert caught.value.hint or (row and row.hint)
    assert peak < most, f"{peak / MIB:.0f} MiB"


def safetensors(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + body)
    return path


def tensor(shape: list[int], stop: int, dtype: str = "F32") -> dict:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}}


HEADERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a header of 2^63 bytes": (lambda p: safetensors(p, {}, length=2**63), "announces a header"),
    "a header of 15 MiB in a file of 10 bytes": (lambda p: safetensors(p, {}, length=15 * MIB), "truncated"),
    "a tensor of 2^94 numbers": (lambda p: safetensors(p, tensor([2**47, 2**47], 4)), "does not take"),
    "a tensor of 4 TiB": (lambda p: safetensors(p, tensor([2**40], 2**42)), "truncated"),
    "offsets beyond all files": (lambda p: safetensors(p, tensor([1], 2**62)), "impossible data_offsets"),
    "a negative shape": (lambda p: safetensors(p, tensor([-1, -4], 16)), "impossible shape"),
    "a thousand dimensions": (lambda p: safetensors(p, tensor([1] * 1000, 4), b"\0" * 4), "impossible shape"),
    "a shape of booleans": (lambda p: safetensors(p, tensor([True], 4), b"\0" * 4), "impossible shape"),
    "endless nesting": (lambda p: safetensors(p, b'{"t":' + b"[" * 100_000), "not"),
    "metadata as a bomb": (lambda p: safetensors(p, {"__metadata__": {"a": ["x"] * 1000}}), "__metadata__"),
    "twice the same tensor": (lambda p: safetensors(p, b'{"t":{},"t":{}}'), "twice"),
    "an integer of a million digits": (lambda p: safetensors(p, b'{"t":' + b"9" * 10**6 + b"}"), "not"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path) -> None:
    make, words = HEADERS[name]
    path = make(tmp_path / "adapter_model.safetensors")
    for read in (read_header, scan):
        with refused(words):
            read(path)


def test_more_tensors_than_any_adapter_has(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path = safetensors(tmp_path / "t.safetensors", {f"t{i}": entry for i in range(MAX_TENSORS + 1)})
    with refused(f"lists {MAX_TENSORS + 1} tensors", most=300 * MIB):  # its header is read: 7 MiB of JSON
        read_header(path)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "notes.txt"])
def test_sparse_files_are_not_read(name: str, tmp_path: Path) -> None:
    """A file of a tebibyte that takes no space."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(2**40)
    with refused(str(64 * MIB)):
        inspect(path, name)


def test_configs_and_manifests(tmp_path: Path) -> None:
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(2**40)
    with refused("more than"):
        facts_of(tmp_path)
    with refused("more than"):
        read_capped(tmp_path / "adapter_config.json", 100)
    for bomb in (
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b'{"size":' + b"1" * 10**6 + b"}",
        b"1e999999",
        b'"' + b"\\u0000" * 10**5,
    ):
        with refused("", most=32 * MIB):
            Manifest.parse(bomb)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_an_import_never_follows_links(name: str, tmp_path: Path) -> None:
    """A card that leads to a private key would be published as the adapter's card."""
    source, secret = tmp_path / "source", tmp_path / "id_rsa"
    source.mkdir()
    secret.write_text("{}")
    (source / "adapter_config.json").write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with refused("symbolic link"):
        find(str(source), tmp_path / "room")


@pytest.mark.parametrize("subfolder", ["..", "../..", "/etc", "a/../.."])
def test_an_import_stays_in_its_source(subfolder: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for place in (source, tmp_path):
        (place / "adapter_config.json").write_text("{}")
    with refused("has no adapter in"):
        find(str(source), tmp_path / "room", subfolder=subfolder)


def test_a_signature_of_a_tebibyte(victim, store: Store, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    with (tmp_path / "sig").open("wb") as file:
        file.truncate(2**40)
    store.put(victim())
    with refused("more than"):
        check(store, "acme/tone", tmp_path / "key.pem", tmp_path / "sig")
