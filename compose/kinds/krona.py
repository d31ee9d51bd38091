"""KronA: a Kronecker product as the delta (arXiv:2212.10650), in the layout of LoKr (arXiv:2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below
from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kernels.maps import Kronecker, factors_of
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.patterns import Patterns, as_dict, value_at, whole
from compose.kind.registry import register


class KronaConfig(KindConfig):
    """PEFT's field names (its LoKr). The scale is alpha / r."""

    r: int = Field(8, ge=1, description="rank of the right factor; it stays whole where its larger side is at most 2 r")
    alpha: float = Field(8, description="numerator of the scale")
    decompose_factor: int = Field(-1, ge=-1, description="smaller side of each split of d; -1: nearest to sqrt(d)")
    rank_pattern: Patterns = Field((), description="other ranks, by the end of a module's path")
    alpha_pattern: Patterns = Field((), description="other alphas, by the end of a module's path")


@register("krona")
class Krona(Adapter):
    """`y = W x + s (L kron R) x`, L (l1, l2) zero at first, R (r1, r2) kaiming-uniform, d_out = l1 r1, d_in = l2 r2.

    s = alpha / r. R is (r1, r) (r, r2) where r < max(r1, r2) / 2. Applied as vec(L X R^T) without the product.
    """

    Config = KronaConfig
    config: KronaConfig
    peft_type = "LOKR"
    paper = "arXiv:2212.10650"
    peft_fields = frozenset(
        [
            "r",
            "alpha",
            "decompose_factor",
            "rank_pattern",
            "alpha_pattern",
            "init_weights",
            "rank_dropout",
            "module_dropout",
            "rank_dropout_scale",
            "use_effective_conv2d",  # of convolutions, which are no sites
        ]
    )
    suffixes = {"L": "lokr_w1", "R": "lokr_w2", "R1": "lokr_w2_a", "R2": "lokr_w2_b"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """The factors at each target."""
        chosen = self.targets(sites)
        self.paths = tuple(s.path for s in chosen)
        self._scale: dict[str, float] = {}
        for site in chosen:
            r = int(value_at(self.config.rank_pattern, site.path, self.config.r))
            self._scale[site.path] = value_at(self.config.alpha_pattern, site.path, self.config.alpha) / r
            # d_out = l1 r1 and d_in = l2 r2, as near to squares as the dimensions allow.
            l1, r1 = factors_of(site.out_features, self.config.decompose_factor)
            l2, r2 = factors_of(site.in_features, self.config.decompose_factor)
            self.add(site.path, "L", torch.zeros(l1, l2))
            # LoKr's rule: R is a product of rank r where r is below half of its larger side, else whole.
            if r < max(r1, r2) / 2:
                self.add(site.path, "R1", self._uniform(r1, r))
                self.add(site.path, "R2", self._uniform(r, r2))
            else:
                self.add(site.path, "R", self._uniform(r1, r2))

    def _uniform(self, rows: int, columns: int) -> Tensor:
        factor = torch.empty(rows, columns)
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=self.generator)
        return factor

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The Kronecker map."""
        if path not in self.paths:
            return None
        right = self.at(path, "R") if self.has(path, "R") else self.at(path, "R1") @ self.at(path, "R2")
        return Atoms(delta=Kronecker(self.at(path, "L"), right, self._scale[path]))

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's LoKrConfig."""
        assert isinstance(config, KronaConfig)  # noqa: S101 - narrows the type
        return {
            "r": config.r,
            "alpha": whole(config.alpha),
            "decompose_factor": config.decompose_factor,
            "rank_pattern": as_dict(config.rank_pattern, sites.paths),
            "alpha_pattern": as_dict(config.alpha_pattern, sites.paths),
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT's LoKrConfig."""
        if fields.get("init_weights") == "lycoris":
            raise KindError("this PEFT LoKr has init_weights='lycoris', which kind 'krona' does not know")
        named = ("r", "alpha", "decompose_factor", "rank_pattern", "alpha_pattern")
        return {name: fields[name] for name in named if fields.get(name) is not None}
