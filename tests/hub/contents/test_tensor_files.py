import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from hub.contents.tensor_files import DTYPES, check_finite, read_header, scan, tensor_entries, tensors_digest
from hub.errors import GateError, HubError, IntegrityError

SCRATCH = "t.safetensors"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """One directory for all examples of a property; each writes its file anew."""
    return tmp_path_factory.mktemp("scratch")


def write(path: Path, header: dict | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def tensor(dtype: str = "F32", shape: list[int] | None = None, start: int = 0, stop: int = 8) -> dict:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [start, stop]}


def test_entries_equal_what_safetensors_wrote(tmp_path: Path) -> None:
    import hashlib

    arrays = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(4, dtype=np.int8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5),
    }
    save_file(arrays, tmp_path / SCRATCH)
    entries = tensor_entries(tmp_path / SCRATCH)
    assert [entry.name for entry in entries] == sorted(arrays)
    for entry in entries:
        assert entry.shape == arrays[entry.name].shape
        assert entry.sha256 == hashlib.sha256(arrays[entry.name].tobytes()).hexdigest()
    found = scan(tmp_path / SCRATCH)
    assert found.sha256 == hashlib.sha256((tmp_path / SCRATCH).read_bytes()).hexdigest()


@settings(max_examples=40)
@given(
    st.permutations(["a", "b", "c", "d"]), st.integers(0, 3), st.dictionaries(st.text(max_size=5), st.text(max_size=5))
)
def test_tensors_digest_survives_reserialization(scratch, order, cut, metadata) -> None:
    directory = scratch
    arrays = {name: np.full((2, 3), ord(name), np.float32) for name in "abcd"}
    save_file(arrays, directory / "one.safetensors")
    reference = tensors_digest(tensor_entries(directory / "one.safetensors"))
    # Written anew: another order of the bytes, other metadata, padding, and split over two files.
    entries = []
    for part in (order[:cut], order[cut:]):
        header, data = {"__metadata__": metadata}, b""
        for name in part:
            raw = arrays[name].tobytes()
            header[name] = tensor("F32", [2, 3], len(data), len(data) + len(raw))
            data += raw
        path = write(directory / "two.safetensors", json.dumps(header).encode() + b"   ", data)
        entries += tensor_entries(path)
    assert tensors_digest(entries) == reference


def test_tensors_digest_sees_name_dtype_shape_and_bytes(tmp_path: Path) -> None:
    base = {"a": np.ones((2, 3), np.float32)}
    variants = [
        base,
        {"b": base["a"]},
        {"a": base["a"].view(np.int32)},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"] * 2},
        {**base, "c": np.zeros(1, np.float32)},
    ]
    digests = set()
    for arrays in variants:
        save_file(arrays, tmp_path / SCRATCH)
        digests.add(tensors_digest(tensor_entries(tmp_path / SCRATCH)))
    assert len(digests) == len(variants)


NONFINITE = {
    "F64": [np.array([v], "<f8").tobytes() for v in (np.nan, np.inf, -np.inf)],
    "F32": [np.array([v], "<f4").tobytes() for v in (np.nan, np.inf, -np.inf)],
    "F16": [np.array([v], "<f2").tobytes() for v in (np.nan, np.inf, -np.inf)],
    "BF16": [np.array([v], "<f4").tobytes()[2:] for v in (np.nan, np.inf, -np.inf)],
    "F8_E5M2": [b"\x7c", b"\xfc", b"\x7e"],
    "F8_E4M3": [b"\x7f", b"\xff"],
}


@pytest.mark.parametrize("dtype", sorted(NONFINITE))
def test_nonfinite_values_are_found(tmp_path: Path, dtype: str) -> None:
    size = DTYPES[dtype].size
    for bad in NONFINITE[dtype]:
        data = b"\0" * size * 3 + bad + b"\0" * size
        path = write(tmp_path / SCRATCH, {"w": tensor(dtype, [5], 0, 5 * size)}, data)
        with pytest.raises(GateError, match=r"w holds 1 NaN or Inf values \(the first at flat index 3"):
            check_finite(path)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_finite_extremes_pass(tmp_path: Path, dtype: str) -> None:
    size, mask = DTYPES[dtype]
    largest = {"F8_E4M3": 0x7E}.get(dtype, None if mask is None else mask - 1)
    if mask is None:
        data = b"\xff" * size * 2  # every integer is finite
    else:
        sign = 1 << (8 * size - 1)
        data = largest.to_bytes(size, "little") + (largest | sign).to_bytes(size, "little")
    path = write(tmp_path / SCRATCH, {"w": tensor(dtype, [2], 0, 2 * size)}, data)
    check_finite(path)
    assert not scan(path).tensors[0].zero


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bf16_bits_agree_with_float32(scratch, values) -> None:
    path = scratch / SCRATCH
    bits = (np.array(values, np.float32).view(np.uint32) >> 16).astype("<u2")
    back = (bits.astype(np.uint32) << 16).view(np.float32)
    write(path, {"w": tensor("BF16", [len(bits)], 0, 2 * len(bits))}, bits.tobytes())
    found = scan(path).tensors[0]
    assert found.nonfinite == np.count_nonzero(~np.isfinite(back))
    assert found.zero == (not back.any())


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    save_file({"w": np.array([0.0, -0.0], np.float32)}, tmp_path / SCRATCH)
    assert scan(tmp_path / SCRATCH).tensors[0].zero


def test_a_tensor_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hub.contents.tensor_files

    monkeypatch.setattr(hub.contents.tensor_files, "CHUNK", 1000)
    values = np.zeros(5000, np.float32)
    values[4321] = np.nan
    save_file({"w": values, "v": np.ones(10, np.float64)}, tmp_path / SCRATCH)
    with pytest.raises(GateError, match="flat index 4321"):
        check_finite(tmp_path / SCRATCH)


@pytest.mark.parametrize(
    ("header", "data", "error", "words"),
    [
        ({"w": tensor()}, b"\0" * 7, IntegrityError, "truncated"),
        ({"w": tensor()}, b"\0" * 9, IntegrityError, "1 bytes that belong to no tensor"),
        ({"w": tensor(), "v": tensor()}, b"\0" * 8, IntegrityError, "overlap"),
        ({"w": tensor(start=4, stop=12)}, b"\0" * 12, IntegrityError, "gap"),
        ({"w": tensor(shape=[3])}, b"\0" * 8, IntegrityError, "does not take"),
        ({"w": tensor(shape=[2**40, 2**40])}, b"\0" * 8, IntegrityError, "does not take"),
        ({"w": tensor(shape=[2**50])}, b"\0" * 8, GateError, "impossible shape"),
        ({"w": tensor(shape=[-2])}, b"\0" * 8, GateError, "impossible shape"),
        ({"w": tensor(shape=[True])}, b"\0" * 8, GateError, "impossible shape"),
        ({"w": tensor(shape=[1] * 17)}, b"\0" * 8, GateError, "impossible shape"),
        ({"w": tensor(dtype="OBJ")}, b"\0" * 8, GateError, "dtype"),
        ({"w": tensor(start=8, stop=0)}, b"\0" * 8, IntegrityError, "does not take"),
        ({"w": {**tensor(), "extra": 1}}, b"\0" * 8, IntegrityError, "nothing else"),
        ({"w": 3}, b"", IntegrityError, "nothing else"),
        ({"__metadata__": {"a": 1}}, b"", IntegrityError, "__metadata__"),
        (b"[]", b"", IntegrityError, "not a JSON object"),
        (b"{", b"", IntegrityError, "not JSON"),
        (b'{"w": 1, "w": 2}', b"", IntegrityError, "twice"),
    ],
)
def test_hostile_headers(tmp_path: Path, header, data: bytes, error, words: str) -> None:
    path = write(tmp_path / SCRATCH, header, data)
    with pytest.raises(error, match=words):
        read_header(path)


def test_absurd_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / SCRATCH, b"{}", length=2**63)
    with pytest.raises(GateError, match="announces a header"):
        read_header(path)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / SCRATCH, b"{}", length=1000)
    with pytest.raises(IntegrityError, match="truncated inside its header"):
        read_header(path)


@settings(max_examples=200)
@given(st.data())
def test_mutated_files_give_hub_errors_only(scratch, data) -> None:
    good = bytearray(save({"a": np.ones((3, 2), np.float32), "b": np.arange(5, dtype=np.int64)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    path = scratch / SCRATCH
    path.write_bytes(bytes(good[:cut]) if data.draw(st.booleans()) else bytes(good))
    try:
        scan(path)
    except HubError as error:
        assert str(error)
