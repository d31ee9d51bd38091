"""Fastfood: a fixed random projection in O(D log D) that is remembered by its seed (arXiv:1408.3060).

P = c H G Pi H B: B random signs, Pi a permutation, G normal numbers, H the Walsh-Hadamard transform, c so that P keeps
lengths. The random parts come from numpy's Philox generator, whose raw bits are the same everywhere and for good.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def hadamard(x: Tensor) -> Tensor:
    """H x / sqrt(n) for x (n,), n a power of two: orthonormal and its own inverse, so also its own derivative."""
    n = x.shape[0]
    h = 1
    while h < n:
        pairs = x.view(-1, 2, h)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).reshape(n)
        h *= 2
    return x / math.sqrt(n)


@dataclass(frozen=True)
class Fastfood:
    """P (D, d) for ``inputs`` d and ``outputs`` D; the random parts have n = 2^k >= max(d, D) elements."""

    inputs: int
    outputs: int
    signs: Tensor  # (n,) int8
    order: Tensor  # (n,) int32
    normal: Tensor  # (n,) float32, of mean square 1

    @classmethod
    def seeded(cls, inputs: int, outputs: int, seed: str) -> Fastfood:
        """The projection of this seed, the same on every machine."""
        n = 1 << (max(inputs, outputs) - 1).bit_length()
        key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
        bits = np.random.Philox(key=key)
        signs = (bits.random_raw(n) >> np.uint64(63)).astype(np.int8) * 2 - 1
        order = np.argsort(bits.random_raw(n), kind="stable").astype(np.int32)
        uniform = ((bits.random_raw(2 * n) >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53  # in (0, 1]
        normal = np.sqrt(-2 * np.log(uniform[:n])) * np.cos(2 * np.pi * uniform[n:])  # Box-Muller
        normal /= math.sqrt(float(np.mean(normal**2)))
        return cls(inputs, outputs, *(torch.from_numpy(a) for a in (signs, order, normal.astype(np.float32))))

    def to(self, device: torch.device) -> Fastfood:
        """The same on another device."""
        return Fastfood(self.inputs, self.outputs, *(t.to(device) for t in (self.signs, self.order, self.normal)))

    def __call__(self, v: Tensor) -> Tensor:
        """P v (D,), float32: D entries of a vector whose length is that of v times sqrt(D / n) on average, rescaled."""
        n = len(self.signs)
        x = F.pad(v.float(), (0, n - self.inputs)) * self.signs
        x = hadamard(x)[self.order.long()] * self.normal
        return hadamard(x)[: self.outputs] * math.sqrt(n / self.outputs)
