"""What a merge keeps of each task vector before the vectors meet: all of it, the largest part, or a random part.

A trim looks at one adapter's whole scope (a place, or the whole adapter) and returns, for a place, a function of its
blocks of rows, which are handed to it in order. Merges name their trims when they are declared, which needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from compose.parameter_space.blocks import Source

    OnBlocks: TypeAlias = Callable[[Tensor], Tensor]
    Trim: TypeAlias = Callable[[Sequence[Source], Any], Callable[[Source], OnBlocks]]

_LEVELS = 2**16  # of the probability to keep an entry


def all_of_it(scope: Sequence[Source], o: Any) -> Callable[[Source], OnBlocks]:  # noqa: ARG001
    """Keep everything."""
    return lambda source: lambda block: block  # noqa: ARG005


def largest(scope: Sequence[Source], o: Any) -> Callable[[Source], OnBlocks]:
    """Keep the ``density`` of the scope's entries that have the largest magnitude; equal magnitudes stay together."""
    import numpy as np
    from torch.nn import functional as F

    from compose.parameter_space.blocks import kth_magnitude, size

    if o.density == 1:
        return all_of_it(scope, o)
    threshold = kth_magnitude(scope, max(1, int(o.density * size(scope))))
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))  # hardshrink keeps what is above
    return lambda source: lambda block: F.hardshrink(block, below)  # noqa: ARG005


def random(scope: Sequence[Source], o: Any) -> Callable[[Source], OnBlocks]:
    """Keep each entry with probability ``density`` and rescale: by 1 / density, to the same L1 norm, or not.

    The stream is seeded by ``seed`` and the content of the vector, so it depends neither on the order of the adapters
    nor on their names, nor on the size of the blocks.
    """
    if o.density == 1:
        return all_of_it(scope, o)

    def at(source: Source) -> OnBlocks:
        seed = blake2b(source.key() + str(o.seed).encode(), digest_size=8).digest()
        level = max(1, round(o.density * _LEVELS))
        factor = {"density": _LEVELS / level, None: 1.0}.get(o.rescale) or _l1_factor(source, seed, level)
        return _dropper(seed, level, factor)

    return at


def _dropper(seed: bytes, level: int, factor: float) -> OnBlocks:
    """Keep entries with probability ``level`` / 2^16, times ``factor``: sixteen random bits an entry, row by row."""
    import numpy as np
    import torch

    stream = np.random.SFC64(int.from_bytes(seed, "big"))

    def drop(block: Tensor) -> Tensor:
        rows, width = block.shape
        words = -(-width // 4)  # of 64 bits
        bits = stream.random_raw(rows * words).view(np.uint16).reshape(rows, 4 * words)[:, :width]
        return block * (torch.from_numpy(bits < level).to(block.device, block.dtype) * factor)

    return drop


def _l1_factor(source: Source, seed: bytes, level: int) -> float:
    import torch

    from compose.parameter_space.blocks import spans

    read, drop = source.reader(), _dropper(seed, level, 1.0)
    before = after = 0.0
    for lo, hi in spans(source.rows, source.width):
        block = read(lo, hi)
        before += float(block.abs().sum(dtype=torch.float64))
        after += float(drop(block).abs().sum(dtype=torch.float64))
    return before / after if after else 1.0
