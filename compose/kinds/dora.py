"""DoRA: weight-decomposed low-rank adaptation (arXiv:2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below
from compose.base.sites import SiteMap
from compose.base.weights import row_norm_squared
from compose.kind.low_rank import LowRank
from compose.kind.registry import register


@register("dora")
class Dora(LowRank):
    """`y = g * (W x + s B A x)`, `g = m / ||W + s B A||_row`, m (d_out,), with the norm held constant in backward.

    The norm needs no W + s B A in memory:
    ||W + sBA||^2_row = ||W||^2_row + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B),
    and W A^T is the base layer applied to the rows of A, so quantized bases need no dequantization.
    """

    paper = "arXiv:2402.09353"
    reads_below = True

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """A and B as LoRA's; m starts as the row norm of W, so g = 1."""
        super().build(sites, model)
        for site in map(sites.__getitem__, self.paths):
            norm = row_norm_squared(model.get_submodule(site.module)).sqrt()
            self.add(site.path, "magnitude", site.share(norm).cpu())

    def lower(self, path: str, below: Below) -> Atoms | None:
        """Gain g on y0, and the pair (A, g * B)."""
        if path not in self.paths:
            return None
        a, b, m = self.at(path, "A"), self.at(path, "B"), self.at(path, "magnitude")
        gain = m / self._norm(below, a, b, self.scales[path]).to(m.dtype)  # (d_out,)
        return Atoms(A=a, B=gain[:, None] * b, scale=self.scales[path], gain=gain, dropout=self.dropout)

    @torch.no_grad()
    def _norm(self, below: Below, a: Tensor, b: Tensor, s: float) -> Tensor:
        a, b = a.float(), b.float()
        wa = below.apply(a).float().T  # (d_out, r)
        cross = 2 * s * (wa * b).sum(1) + s * s * ((b @ (a @ a.T)) * b).sum(1)
        return (below.row_norm_squared() + cross).clamp_min(0).sqrt()
