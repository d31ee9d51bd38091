"""Dense deltas: whole weights that moved, for partial freezing and full fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.kernels.maps import Dense, LinearMap
from compose.kind.parameter_shift import Shift
from compose.kind.registry import register


@register("dense")
class DenseShift(Shift):
    """`y = (W + D) x + c + b` with D (d_out, d_in) and b (d_out,), both zero at first; norms and embeddings likewise.

    The reference every claim is measured against. The base stays frozen, so a quantized one can be fine-tuned whole: D
    is then added in the compute dtype. Partial freezing is ``layers``; full fine-tuning is ``target_modules="all"``.
    """

    paper = "arXiv:1911.03090"
    suffixes = {"weight": "weight_delta", "bias": "bias_delta"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """A zero for each parameter."""
        for place in self.places(sites, model):
            self.add(place.path, place.name, torch.zeros(place.shape))

    def map_at(self, path: str, name: str) -> LinearMap:
        """The matrix."""
        return Dense(self.at(path, name))

    def vector_at(self, path: str, name: str) -> Tensor:
        """The tensor itself."""
        return self.at(path, name)
