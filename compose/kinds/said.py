"""Intrinsic dimension, structure-aware: one short vector moves all weights (SAID, arXiv:2012.13255)."""

from __future__ import annotations

import torch
from pydantic import Field
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below
from compose.base.sites import SiteMap
from compose.kernels.fastfood import Fastfood
from compose.kernels.maps import Dense
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register


class SaidConfig(KindConfig):
    """Length of the vector, and the seed of the projections, which are never stored."""

    intrinsic_dimension: int = Field(200, ge=1, description="d, the numbers that are trained for all weights together")
    projection_seed: int = Field(0, ge=0, description="the projections are made from it, anew on each machine")
    structure_aware: bool = Field(True, description="a trained scale lambda for each weight (SAID); without: DID")


@register("said")
class Said(Adapter):
    """`W_i + lambda_i P_i(v)`, v (d,) shared by all sites and zero at first, lambda_i one number a site, 1 at first.

    P_i: R^d -> R^(d_out d_in) is a Fastfood projection made from the seed and the name of the site (3 bytes and a
    float a weight while it is in use). Frozen, a site holds its delta (d_out, d_in) and no projection.
    """

    Config = SaidConfig
    config: SaidConfig
    paper = "arXiv:2012.13255"
    default_targets = tuple(f"attn.{x}" for x in ("q", "k", "v", "qkv", "o")) + tuple(
        f"mlp.{x}" for x in ("gate", "up", "gate_up", "down")
    )
    suffixes = {"v": "intrinsic", "lambda": "intrinsic_scale"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """The vector, and a scale a site."""
        chosen = self.targets(sites)
        self.paths = tuple(s.path for s in chosen)
        self._shapes = {s.path: (s.out_features, s.in_features) for s in chosen}
        self._projections: dict[str, Fastfood] = {}
        self.add("", "v", torch.zeros(self.config.intrinsic_dimension))
        for path in self.paths if self.config.structure_aware else ():
            self.add(path, "lambda", torch.ones(()))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The delta, a matrix."""
        if path not in self.paths:
            return None
        rows, columns = self._shapes[path]
        v = self.at("", "v")
        delta = self._projection(path)(v).view(rows, columns)
        if self.config.structure_aware:
            delta = delta * self.at(path, "lambda")
        return Atoms(delta=Dense(delta.to(v.dtype)))

    def _projection(self, path: str) -> Fastfood:
        rows, columns = self._shapes[path]
        projection = self._projections.get(path)
        if projection is None:
            v, seed = self.at("", "v"), f"{self.config.projection_seed}:{path}"
            projection = Fastfood.seeded(len(v), rows * columns, seed).to(v.device)
            if self.trainable:
                self._projections[path] = projection
        if not self.trainable:
            self._projections.pop(path, None)
        return projection
