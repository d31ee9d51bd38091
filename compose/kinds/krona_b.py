"""KronA^B: a Kronecker product beside the feed-forward block, with a learned residual or without (arXiv:2212.10650)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Function
from compose.base.sites import SiteMap
from compose.kernels.maps import Kronecker, factors_of
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register


class KronaBConfig(KindConfig):
    """How the hidden size is split into factors, and how strongly the product counts."""

    scaling: float = Field(1.0, description="s, fixed")
    decompose_factor: int = Field(-1, ge=-1, description="smaller factor of the hidden size d; -1: nearest to sqrt(d)")
    residual: bool = Field(False, description="KronA^B_res: a learned multiple of the block's input is added as well")


@register("krona_b")
class KronaB(Adapter):
    """`FFN(z) + s (L kron R) z + t z`, z (..., d) the input of the block, L (m, m) zero at first, R (d / m, d / m).

    t is one number a layer, zero at first, with ``residual``; else there is none. R is kaiming-uniform.
    """

    Config = KronaBConfig
    config: KronaBConfig
    paper = "arXiv:2212.10650"
    averages_in_weight = False
    default_targets = ("mlp.down",)
    suffixes = {"L": "kron_left", "R": "kron_right", "t": "residual_scale"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """The factors for each block."""
        chosen = self.targets(sites)
        self.paths = tuple(s.path for s in chosen)
        self._taps = {s.path: sites.entry_beside(s).path for s in chosen}
        for site in chosen:
            m, n = factors_of(site.out_features, self.config.decompose_factor)
            right = torch.empty(n, n)
            nn.init.kaiming_uniform_(right, a=math.sqrt(5), generator=self.generator)
            self.add(site.path, "L", torch.zeros(m, m))
            self.add(site.path, "R", right)
            if self.config.residual:
                self.add(site.path, "t", torch.zeros(()))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """A function of what enters the block."""
        if path not in self.paths:
            return None
        product = Kronecker(self.at(path, "L"), self.at(path, "R"), self.config.scaling)
        t = self.at(path, "t") if self.config.residual else None

        def fn(z: Tensor) -> Tensor:
            z = z.to(product.left.dtype)
            return product(z) if t is None else product(z) + t * z

        return Atoms(function=Function(fn, self._taps[path]))
