"""Task vectors read in blocks of rows, so that a merge of many adapters never holds more than one of them whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

Reader: TypeAlias = Callable[[int, int], Tensor]
_BLOCK = 2**19  # elements of a block, over all adapters: 2 MiB of float32, about what a core's cache holds
_SAMPLE = 2**16  # elements looked at to guess where a magnitude lies
_LIMIT = 2**23  # candidates kept while the exact one is sought


class Source(Protocol):
    """One adapter's task vector at one place: ``rows`` x ``width`` numbers that ``reader()`` gives in blocks."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    @property
    def width(self) -> int:
        """How long a row is."""

    def reader(self) -> Reader:
        """A function that gives rows lo..hi, float32."""

    def key(self) -> bytes:
        """Digest of the content."""


class TensorSource:
    """A tensor as a source: its first dimension counts the rows."""

    def __init__(self, tensor: Tensor) -> None:
        self._rows = tensor.detach().float().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
        self.rows, self.width = self._rows.shape

    def reader(self) -> Reader:
        """Slices of the tensor."""
        return lambda lo, hi: self._rows[lo:hi]

    def key(self) -> bytes:
        """Digest of the tensor's bytes."""
        content = self._rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return blake2b(content, digest_size=8).digest()


def spans(rows: int, width: int, count: int = 1) -> Iterator[tuple[int, int]]:
    """Bounds lo, hi of the blocks in which ``count`` sources of this shape are read side by side."""
    step = max(1, _BLOCK // max(1, width * count))
    return ((lo, min(lo + step, rows)) for lo in range(0, rows, step))


def blocks(source: Source) -> Iterator[Tensor]:
    """The rows of a source, block by block."""
    read = source.reader()
    return (read(lo, hi) for lo, hi in spans(source.rows, source.width))


def size(sources: Sequence[Source]) -> int:
    """Number of elements of all sources together."""
    return sum(s.rows * s.width for s in sources)


def kth_magnitude(sources: Sequence[Source], k: int) -> float:
    """The k-th largest |x| over all sources, exactly, holding a few megabytes whatever their size.

    A sample of rows brackets it; one pass over the data then counts what lies above and keeps what lies within. Should
    the bracket miss, or hold too much, it is moved or halved and the pass repeated.
    """
    total = size(sources)
    if not 1 <= k <= total:
        raise ValueError(f"there is no {k}-th of {total} numbers")
    # What is known for sure: floor <= the answer < ceiling. [low, high) is only where the sample says it lies.
    floor, ceiling = 0.0, math.inf
    low, high = _bracket(sources, k / total)
    while True:
        above, inside, kept = _count(sources, low, high)
        if above >= k:
            # k numbers lie at high or beyond: the bracket was too low, and the answer is between it and the ceiling.
            floor = low = high
            high = ceiling
        elif above + inside < k:
            # Too few from low on: the bracket was too high.
            ceiling = high = low
            low = floor
        elif kept is not None:
            # The answer is among those that were kept, k - above from their top: no sort, one partition.
            return float(np.partition(kept, inside - (k - above))[inside - (k - above)])
        else:
            # It is inside, among more than can be kept: halve by the order of floats, so at most 31 passes.
            floor, ceiling = low, high
            low = _between(floor, ceiling)
            if low == floor:  # neighbouring floats: more equal numbers than can be kept
                return floor


def _between(low: float, high: float) -> float:
    """The float32 halfway in the order of floats: not negative, their bits sort as they do."""
    bits = torch.tensor([low, high], dtype=torch.float32).view(torch.int32).sum(dtype=torch.int64) // 2
    return float(bits.to(torch.int32).view(torch.float32))


def _bracket(sources: Sequence[Source], share: float) -> tuple[float, float]:
    """Where the magnitude lies that ``share`` of all exceed, by a sample of an eighth of the rows."""
    wanted = min(max(size(sources) // 64, _SAMPLE), 32 * _SAMPLE)
    stride = max(1, size(sources) // (8 * wanted))
    seen: list[np.ndarray[Any, Any]] = []
    for source in sources:
        read = source.reader()
        for lo in range(0, source.rows, 64):
            magnitudes = _magnitudes(read(lo, min(lo + 8, source.rows)))
            seen.append(magnitudes[lo // 64 % min(stride, len(magnitudes)) :: stride])
    sample = np.sort(np.concatenate(seen))[::-1]
    n = len(sample)
    slack = 8 * (n * share * (1 - share)) ** 0.5 + 8  # rows differ in size, so the sample is worse than independent
    first, last = int(n * share - slack), int(n * share + slack)
    return (float(sample[last]) if last < n else 0.0), (float(sample[first]) if first >= 0 else math.inf)


def _count(sources: Sequence[Source], low: float, high: float) -> tuple[int, int, np.ndarray[Any, Any] | None]:
    """How many |x| are >= high, how many lie in [low, high), and those, unless they are too many to keep."""
    above, inside = 0, 0
    kept: list[np.ndarray[Any, Any]] = []
    for source in sources:
        for block in blocks(source):
            x = _magnitudes(block)
            candidates = x[(x >= low) & (x < high)]
            above += int(np.count_nonzero(x >= high))
            inside += len(candidates)
            if inside <= _LIMIT:
                kept.append(candidates)
    return above, inside, np.concatenate(kept) if inside <= _LIMIT else None


def _magnitudes(block: Tensor) -> np.ndarray[Any, Any]:
    # Selecting by a mask is several times faster in numpy than in torch on a CPU.
    return block.abs().flatten().cpu().numpy()
