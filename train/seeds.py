"""Separate random streams from one seed: what happens in one never shifts another.

A stream is a pure function of the seed and of where it is used (`derive(seed, "dropout", step)`), so no generator
state needs saving: resuming at a step is asking for that step's streams again.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *where: str | int) -> int:
    """A 63-bit seed for one place of use, such as `derive(0, "data", epoch)`.

    Streams in use: `init` (new parameters), `data` (row order, held-out rows), `dropout`, `masks`.
    """
    text = "/".join(str(part) for part in (seed, *where))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *where: str | int) -> torch.Generator:
    """A CPU generator at the start of the named stream."""
    return torch.Generator().manual_seed(derive(seed, *where))
