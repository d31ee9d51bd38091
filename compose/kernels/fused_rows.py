"""Rows of a fused linear: which outputs of a qkv or gate-up layer are q's, k's, v's, gate's or up's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class FusedRows:
    """Rows ``start`` to ``stop`` of each of ``groups`` runs that are ``run`` rows long.

    [q | k | v] is one run; GPT-NeoX's rows, q, k and v of a head after those of the head before, are a run a head.
    """

    groups: int
    run: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.groups * (self.stop - self.start)

    def __str__(self) -> str:
        of_each = f" of each {self.run}" if self.groups > 1 else ""
        return f"rows {self.start}-{self.stop - 1}{of_each}"

    def of(self, whole: Tensor, dim: int = -1) -> Tensor:
        """These rows of ``whole`` along ``dim``: a view where they are one slice."""
        dim %= whole.dim()
        apart = whole.reshape(*whole.shape[:dim], self.groups, self.run, *whole.shape[dim + 1 :])
        return apart.narrow(dim + 1, self.start, self.stop - self.start).flatten(dim, dim + 1)

    def into(self, part: Tensor, dim: int = -1) -> Tensor:
        """The whole that has ``part`` in these rows and zeros in the others."""
        dim %= part.dim()
        apart = part.reshape(*part.shape[:dim], self.groups, self.stop - self.start, *part.shape[dim + 1 :])
        after = [0, 0] * (apart.dim() - dim - 2)  # the dimensions behind stay as they are
        return F.pad(apart, [*after, self.start, self.run - self.stop]).flatten(dim, dim + 1)
