"""What a merge keeps of each task vector before the vectors meet: all of it, the largest part, or a random part.

A trim looks at one adapter's whole scope (a place, or the whole adapter) and returns, for a place, a function of its
blocks of rows, which are handed to it in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from compose.parameter_space.blocks import Source, kth_magnitude, size, spans

OnBlocks: TypeAlias = Callable[[Tensor], Tensor]
Trim: TypeAlias = Callable[[Sequence[Source], Any], Callable[[Source], OnBlocks]]


def all_of_it(scope: Sequence[Source], o: Any) -> Callable[[Source], OnBlocks]:  # noqa: ARG001
    """Keep everything."""
    return lambda source: lambda block: block  # noqa: ARG005


def largest(scope: Sequence[Source], o: Any) -> Callable[[Source], OnBlocks]:
    """Keep the ``density`` of the scope's entries that have the largest magnitude; equal magnitudes stay together."""
    if o.density == 1:
        return all_of_it(scope, o)
    threshold = kth_magnitude(scope, max(1, int(o.density * size(scope))))
    return lambda source: lambda block: torch.where(block.abs() >= threshold, block, 0.0)  # noqa: ARG005


def random(scope: Sequence[Source], o: Any) -> Callable[[Source], OnBlocks]:  # noqa: ARG001
    """Keep each entry with probability ``density`` and rescale: by 1 / density, to the same L1 norm, or not.

    The stream is seeded by ``seed`` and the content of the vector, so it depends neither on the order of the adapters
    nor on their names, nor on the size of the blocks.
    """
    if o.density == 1:
        return all_of_it(scope, o)

    def at(source: Source) -> OnBlocks:
        seed = blake2b(source.key() + str(o.seed).encode(), digest_size=8).digest()
        factor = {"density": 1 / o.density, "none": 1.0}.get(o.rescale) or _l1_factor(source, seed, o.density)
        dropped = _dropper(seed, o.density)
        return lambda block: dropped(block) * factor

    return at


def _dropper(seed: bytes, density: float) -> OnBlocks:
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big")))

    def drop(block: Tensor) -> Tensor:
        kept = torch.from_numpy(stream.random(tuple(block.shape), dtype=np.float32) < density)
        return block * kept.to(block.device)

    return drop


def _l1_factor(source: Source, seed: bytes, density: float) -> float:
    read, drop = source.reader(), _dropper(seed, density)
    before = after = 0.0
    for lo, hi in spans(source.rows, source.width):
        block = read(lo, hi)
        before += float(block.abs().sum(dtype=torch.float64))
        after += float(drop(block).abs().sum(dtype=torch.float64))
    return before / after if after else 1.0
