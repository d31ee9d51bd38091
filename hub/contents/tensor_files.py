"""Safetensors files, read without trust and without torch: headers, digests, finite and zero checks.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, raw data.
(https://github.com/huggingface/safetensors, format section of its README.)
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from hub.errors import GateError, IntegrityError, ManifestError
from hub.io import canonical_json as canonical
from hub.io.files import CHUNK, open_regular
from hub.manifest import MAX_TENSORS, TensorEntry

MAX_HEADER = 16 * 2**20  # bytes
MAX_RANK = 16


class DType(NamedTuple):
    """Item size in bytes and, for floating types, the bits that are all set in every Inf and NaN."""

    size: int
    nonfinite: int | None = None


# numpy has no bfloat16 and no float8, so every floating type is checked on its unsigned bits: a value is not
# finite when its exponent bits are all set (float8_e4m3fn: when exponent and mantissa are; it has no Inf).
DTYPES = {
    "F64": DType(8, 0x7FF0_0000_0000_0000),
    "F32": DType(4, 0x7F80_0000),
    "F16": DType(2, 0x7C00),
    "BF16": DType(2, 0x7F80),
    "F8_E5M2": DType(1, 0x7C),
    "F8_E4M3": DType(1, 0x7F),
    **{f"{sign}{8 * size}": DType(size) for sign in "IU" for size in (1, 2, 4, 8)},
    "BOOL": DType(1),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header; `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in the order of their bytes, the metadata, and the file's size in bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int
    size: int


@dataclass(frozen=True, slots=True)
class TensorScan:
    """What the bytes of one tensor say: its entry, how many values are not finite, whether all are zero."""

    entry: TensorEntry
    nonfinite: int
    first_nonfinite: int | None
    zero: bool


@dataclass(frozen=True, slots=True)
class FileScan:
    """One pass over a safetensors file: its hex sha256, size in bytes and tensors."""

    sha256: str
    size: int
    tensors: tuple[TensorScan, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; nothing is allocated that the file does not back.

    Raises
    ------
    GateError
        A header over the caps, an unknown dtype, an impossible shape.
    IntegrityError
        A truncated file, bytes that belong to no tensor or to two, trailing bytes, broken JSON.
    """
    with open_regular(path) as file:
        return _read_header(cast("Readable", file), os.fstat(file.fileno()).st_size, path.name)[0]


class Readable(Protocol):
    """What a scan reads from: a file, or one that is still being written."""

    def read(self, count: int, /) -> bytes:
        """At most so many bytes; fewer only at the end."""
        ...

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill a buffer; less only at the end."""
        ...


def _read_header(file: Readable, size: int, label: str) -> tuple[Header, bytes]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise IntegrityError(f"{label} is truncated: {size} bytes are no safetensors file", path=label)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise GateError(f"{label} announces a header of {length} bytes; at most {MAX_HEADER}", path=label)
    if 8 + length > size:
        raise IntegrityError(f"{label} is truncated inside its header ({size} bytes)", path=label)
    raw = file.read(length)
    try:
        entries = canonical.loads(raw.rstrip(b" "), what=f"the header of {label}", limit=MAX_HEADER)
    except ManifestError as error:
        raise IntegrityError(error.message, path=label) from error
    if not isinstance(entries, dict):
        raise IntegrityError(f"the header of {label} is not a JSON object", path=label)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise IntegrityError(f"{label}: __metadata__ maps text to text", path=label)
    if len(entries) > MAX_TENSORS:
        raise GateError(f"{label} lists {len(entries)} tensors; at most {MAX_TENSORS}", path=label)
    start = 8 + length
    infos = sorted(
        (_info(name, entry, start, label) for name, entry in entries.items()), key=lambda t: (t.start, t.stop)
    )
    _check_coverage(infos, start, size, label)
    return Header(tuple(infos), metadata, start, size), prefix + raw


def _info(name: str, entry: object, data_start: int, label: str) -> TensorInfo:
    def natural(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48

    where = f"{label}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise IntegrityError(f"{where} needs dtype, shape and data_offsets, nothing else", path=label)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise GateError(f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}", path=label)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(natural(n) for n in shape):
        raise GateError(f"{where} has an impossible shape", path=label)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(natural(n) for n in offsets):
        raise IntegrityError(f"{where} has impossible data_offsets", path=label)
    if math.prod(shape) * DTYPES[dtype].size != offsets[1] - offsets[0]:
        raise IntegrityError(f"{where}: {dtype}{shape} does not take {offsets[1] - offsets[0]} bytes", path=label)
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_coverage(infos: list[TensorInfo], start: int, size: int, label: str) -> None:
    position = start
    for info in infos:
        if info.start != position:
            raise IntegrityError(f"{label}: the bytes of {info.name!r} overlap others or leave a gap", path=label)
        position = info.stop
    if position > size:
        raise IntegrityError(f"{label} is truncated: {size} bytes, its header needs {position}", path=label)
    if position < size:
        raise IntegrityError(f"{label} has {size - position} bytes that belong to no tensor", path=label)


def scan(path: Path, name: str | None = None) -> FileScan:
    """Hash and check a safetensors file in one pass: file digest, tensor digests, finite and zero checks.

    Parameters
    ----------
    path
        The file.
    name
        What errors call it, where that is not its own name (a blob has only a digest).

    Raises
    ------
    GateError, IntegrityError
        As `read_header`.
    """
    with open_regular(path) as file:
        return scan_stream(cast("Readable", file), os.fstat(file.fileno()).st_size, name or path.name)


def scan_stream(file: Readable, size: int, label: str) -> FileScan:
    """`scan` of an open file that has, or will have, so many bytes."""
    header, raw = _read_header(file, size, label)
    with _Whole(raw, header.size - header.data_start) as whole:
        tensors = tuple(_scan_tensor(file, info, whole, label) for info in header.tensors)
    return FileScan(whole.hasher.hexdigest(), header.size, tensors)


class _Whole:
    """Hash of the whole file, taken in a second thread while the first one hashes and checks the tensors.

    Two buffers take turns: one is being filled and checked while the other one is still being hashed.
    """

    def __init__(self, header: bytes, size: int) -> None:
        self.hasher = hashlib.sha256(header)
        self._buffers = [memoryview(bytearray(min(CHUNK, max(size, 8)))) for _ in range(2)]
        self._pool = ThreadPoolExecutor(1) if size > CHUNK else None
        self._busy: list[Future[None] | None] = [None, None]

    def buffer(self) -> memoryview:
        """Return a buffer that is not being hashed any more."""
        self._buffers.reverse()
        self._busy.reverse()
        if (busy := self._busy[0]) is not None:
            busy.result()
        return self._buffers[0]

    def update(self, part: memoryview) -> None:
        """Hash a part of the buffer that was given last."""
        if self._pool is None:
            self.hasher.update(part)
        else:
            self._busy[0] = self._pool.submit(self.hasher.update, part)

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _scan_tensor(file: Readable, info: TensorInfo, whole: _Whole, label: str) -> TensorScan:
    own, left, done = hashlib.sha256(), info.stop - info.start, 0
    bad, first, zero = 0, None, True
    item = DTYPES[info.dtype].size
    while left:
        buffer = whole.buffer()
        count = file.readinto(buffer[: min(left, len(buffer) - len(buffer) % item)])
        if not count or count % item:
            raise IntegrityError(f"{label} ended while it was read", path=label)
        part = buffer[:count]
        whole.update(part)
        own.update(part)
        found, where, blank = _check_values(part, info.dtype)
        if found and first is None:
            first = done // item + where
        bad, zero = bad + found, zero and blank
        left, done = left - count, done + count
    entry = TensorEntry(name=info.name, dtype=info.dtype, shape=info.shape, sha256=own.hexdigest())
    return TensorScan(entry, bad, first, zero)


def _check_values(data: memoryview, dtype: str) -> tuple[int, int, bool]:
    """Count of values that are not finite, index of the first, and whether all are (plus or minus) zero."""
    import numpy as np

    size, mask = DTYPES[dtype]
    bits = np.frombuffer(data, dtype=f"<u{size}")
    if mask is None:
        return 0, 0, not bits.any()
    sign = 1 << (8 * size - 1)
    kind = bits.dtype.type
    zero = not (bits & kind(sign - 1)).any() if not bits[0] & kind(sign - 1) else False
    wrong = (bits & kind(mask)) == kind(mask)
    count = int(np.count_nonzero(wrong))
    return count, int(wrong.argmax()) if count else 0, zero


def tensor_entries(path: Path) -> tuple[TensorEntry, ...]:
    """Entries of all tensors of a safetensors file, sorted by name."""
    return tuple(sorted((tensor.entry for tensor in scan(path).tensors), key=lambda entry: entry.name))


def tensors_digest(entries: Iterable[TensorEntry]) -> str:
    """Digest of the parameters alone: over the sorted (name, dtype, shape, sha256 of the raw bytes).

    It survives re-serialization: another order, other metadata or two files joined give the same digest.
    """
    rows = sorted([entry.name, entry.dtype, list(entry.shape), entry.sha256] for entry in entries)
    return canonical.digest(canonical.dumps(rows))


def check_finite(path: Path) -> None:
    """Raise GateError when a floating tensor of the file holds NaN or Inf, naming tensor, count and place."""
    refuse_nonfinite(scan(path), path.name)


def refuse_nonfinite(file: FileScan, name: str) -> None:
    """Raise GateError for the first tensor of a scan that holds NaN or Inf."""
    for tensor in file.tensors:
        if tensor.nonfinite:
            raise GateError(
                f"{name}: {tensor.entry.name} holds {tensor.nonfinite} NaN or Inf values "
                f"(the first at flat index {tensor.first_nonfinite} of shape {list(tensor.entry.shape)})",
                path=name,
                hint="train again with a lower learning rate or without fp16; broken weights are not published",
            )
