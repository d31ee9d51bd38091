"""Fastfood: a fixed random projection in O(D log D) that is remembered by its seed (arXiv:1408.3060).

P = c H G Pi H B: B random signs, Pi a permutation, G normal numbers, H the Walsh-Hadamard transform, c so that P keeps
lengths. The random parts come from numpy's Philox generator, whose raw bits are the same everywhere and for good.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 128  # of the index, for one matrix product


def hadamard(x: Tensor) -> Tensor:
    """`H x / sqrt(n)` for x (n,), n a power of two: orthonormal and its own inverse, so also its own derivative.

    H_n is the Kronecker product of smaller ones, each a matrix product over its share of the index: the operations of
    a butterfly times a few, at the speed of a matrix product.
    """
    n = x.shape[0]
    done = min(n, _BLOCK)
    with torch.autocast(x.device.type, enabled=False):  # sums of a million terms want all their digits
        x = x.view(-1, done) @ _signs(done).to(x)
        while done < n:
            size = min(_BLOCK, n // done)
            x = _signs(size).to(x) @ x.view(-1, size, done)
            done *= size
    return x.reshape(n) / math.sqrt(n)


@cache
def _signs(n: int) -> Tensor:
    """The Walsh-Hadamard matrix (n, n) of ones and minus ones."""
    with torch.inference_mode(False):  # it is kept, and later calls may want gradients
        h = torch.ones(1, 1, device="cpu")
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@dataclass(frozen=True)
class Fastfood:
    """P (D, d) for d ``inputs`` and D ``outputs``; its random parts have n = 2^k >= max(d, D) elements."""

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
        # The raw bits of this generator are the same on every machine and in every numpy; its floats need not be.
        bits = np.random.Philox(key=key)
        signs = (bits.random_raw(n) >> np.uint64(63)).astype(np.int8) * 2 - 1
        order = np.argsort(bits.random_raw(n), kind="stable").astype(np.int32)
        uniform = ((bits.random_raw(2 * n) >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53  # in (0, 1]
        normal = np.sqrt(-2 * np.log(uniform[:n])) * np.cos(2 * np.pi * uniform[n:])  # Box-Muller
        # Mean square 1 exactly, so that the length of P v does not depend on the seed.
        normal /= math.sqrt(float(np.mean(normal**2)))
        return cls(inputs, outputs, *(torch.from_numpy(a) for a in (signs, order, normal.astype(np.float32))))

    def to(self, device: torch.device) -> Fastfood:
        """The same on another device."""
        return Fastfood(self.inputs, self.outputs, *(t.to(device) for t in (self.signs, self.order, self.normal)))

    def __call__(self, v: Tensor) -> Tensor:
        """`P v` (D,), float32: D entries of a vector as long as v times sqrt(D / n) on average, rescaled."""
        n = len(self.signs)
        m = 1 << (self.inputs - 1).bit_length()
        # Of a vector that is zero from place m on, the transform of length n repeats the one of length m.
        x = hadamard(F.pad(v.float(), (0, m - self.inputs)) * self.signs[:m]) * math.sqrt(m / n)
        x = x.gather(0, self.order.long() & (m - 1)) * self.normal
        return hadamard(x)[: self.outputs] * math.sqrt(n / self.outputs)
