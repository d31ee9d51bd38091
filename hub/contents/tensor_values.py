"""Tensors of safetensors files as numbers, read by numpy alone, a part at a time: norms, and norms of differences.

bfloat16 and float8 are unknown to numpy; their bits are widened by hand. All sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hub.contents.tensor_files import DTYPES, TensorInfo
from hub.errors import GateError, IntegrityError
from hub.io.files import open_regular

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers: TypeAlias = "NDArray[np.float64]"

_PART = 2**20  # numbers read at a time


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a tensor b is from a tensor a of its shape.

    ``a`` and ``b`` are Frobenius norms, ``difference`` is ||b - a||, ``largest`` is max |b - a|, ``dot`` is <a, b>.
    """

    a: float
    b: float
    difference: float
    largest: float
    dot: float

    @property
    def relative(self) -> float | None:
        """||b - a|| / ||a||; None where a is zero."""
        return self.difference / self.a if self.a else None

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b; None where one of them is zero."""
        return self.dot / (self.a * self.b) if self.a and self.b else None


def distance(a: tuple[Path, TensorInfo], b: tuple[Path, TensorInfo]) -> Distance:
    """Compare two tensors of one shape, whatever their dtypes, without holding either in memory.

    Parameters
    ----------
    a, b
        A file and the entry of its header.

    Raises
    ------
    IntegrityError
        A file ended while it was read.
    """
    import numpy as np

    sums, largest = np.zeros(4), 0.0
    for x, y in zip(numbers(*a), numbers(*b), strict=True):
        gap = y - x
        sums += (x @ x, y @ y, gap @ gap, x @ y)
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    norm_a, norm_b, difference = (float(value) for value in np.sqrt(sums[:3]))
    return Distance(norm_a, norm_b, difference, largest, float(sums[3]))


def numbers(path: Path, info: TensorInfo) -> Iterator[Numbers]:
    """Values of a tensor in order, flat, at most `_PART` at a time."""
    import numpy as np

    size, decode = DTYPES[info.dtype].size, _decoder(info.dtype)
    with open_regular(path) as file:
        file.seek(info.start)
        left = info.stop - info.start
        while left:
            data = file.read(min(left, _PART * size))
            if not data or len(data) % size:
                raise IntegrityError(f"{path.name} ended while it was read", path=path)
            left -= len(data)
            with np.errstate(invalid="ignore"):  # a signalling NaN is widened, not computed with
                values = decode(data)
            yield values


@cache
def _decoder(dtype: str) -> Callable[[bytes], Any]:
    import numpy as np

    plain = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "u1"}
    plain |= {f"{sign}{8 * size}": f"<{sign.lower()}{size}" for sign in "IU" for size in (1, 2, 4, 8)}
    if dtype in plain:
        return lambda data: np.frombuffer(data, plain[dtype]).astype(np.float64)
    if dtype == "BF16":  # the upper half of a float32
        return lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return lambda data: (np.frombuffer(data, "u1").astype("<u2") << 8).view("<f2").astype(np.float64)
    if dtype == "F8_E4M3":
        table = np.array([_e4m3(bits) for bits in range(256)])
        return lambda data: table[np.frombuffer(data, "u1")]
    raise GateError(f"numbers of dtype {dtype} cannot be read")


def _e4m3(bits: int) -> float:
    """Value of a float8_e4m3fn: bias 7, no Inf, NaN where exponent and mantissa are all ones (arXiv:2209.05433)."""
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = (bits >> 3) & 0xF, bits & 7
    if exponent == 0xF and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
