"""Block functions of many adapters, each for rows of its own, in two products: the non-linear twin of ``gather``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compose.atoms import Block
from compose.kernels.low_rank import Pair, gather_factors, mix, padded, picks


class Blocks:
    """Each row's own block functions sum_e w_e s_e (U_e f(D_e z + b_e) + u_e), side by side: two batched GEMMs.

    Weights (R, E); ``used`` (R,) is one for the rows that have a block, for which alone it is called.
    """

    def __init__(self, blocks: Sequence[Block], weights: Tensor) -> None:
        self.used = (weights != 0).any(1).to(weights.dtype)
        weights = weights[self.used != 0]  # (n, E)
        self._act = blocks[0].act
        a, self._b = gather_factors([Pair(b.down, b.up, b.scale) for b in blocks], weights)
        self._a = a.transpose(1, 2)  # (n, d, k)
        picked, w = picks(weights)
        width = max(len(b.down) for b in blocks)
        inner = torch.stack([padded(b.down_b[:, None], width) for b in blocks])  # (E, m, 1)
        self._inner = inner[picked].masked_fill(w == 0, 0).flatten(1)[:, None]  # (n, 1, k)
        self._outer = mix(weights, torch.stack([b.up_b * b.scale for b in blocks]))[:, None]  # (n, 1, d_out)

    def __call__(self, z: Tensor) -> Tensor:
        """The sum for z (n, T, d)."""
        hidden = self._act(torch.baddbmm(self._inner, z.to(self._a.dtype), self._a))  # (n, T, k)
        return torch.baddbmm(self._outer, hidden, self._b)
