"""PHATGOOSE: a gate for each expert, trained after it and without knowing of the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from router.bench import Bench, sites_of
from router.gating import Gating
from router.scorer import ScorerOptions, SiteScorer, SiteScores, Statistics, register
from router.sitewise import SiteVectors, learn


class PhatgooseOptions(ScorerOptions):
    """The training of each expert's gate."""

    steps: int = Field(100, ge=1, description="steps of training for each expert's gate")
    lr: float = Field(1e-3, gt=0, description="learning rate")


@register("phatgoose")
class Phatgoose(SiteScorer):
    """`score_e = LN(v_e) . LN(x) / sqrt(d)`, LN without parameters; softmax over the top 2 (arXiv 2402.05859).

    v_e is learned for one expert at a time, frozen like the base, as `y = W x + D_e x sigmoid(v_e . x)`, from
    `v_e = 0`. A member is added by training its own gate; the others stay as they are.
    """

    Options = PhatgooseOptions
    paper = "arXiv 2402.05859"
    gating = Gating(top_k=2)

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """A vector (d_in,) for each site of the expert."""
        alone = {expert: bench.experts[expert]}
        device = bench.model.device
        vectors = {
            path: nn.Parameter(torch.zeros(d, device=device)) for path, d in sites_of(bench.model, alone).items()
        }

        def gate(path: str, x: Tensor) -> Tensor:
            return torch.sigmoid(x.float() @ vectors[path])[..., None]  # (B, T, 1)

        options = self.options
        learn(
            bench,
            alone,
            gate,
            list(vectors.values()),
            names=[expert],
            steps=options.steps,
            lr=options.lr,
            what=f"gate of {expert}",
        )
        return {path: v.detach().float().cpu() for path, v in vectors.items()}

    def scores(self, statistics: Mapping[str, Statistics]) -> SiteScores:
        """Cosine-like products of standardized gates and inputs."""
        table = SiteVectors(statistics)

        def score(path: str, x: Tensor) -> Tensor | None:
            vectors = table.at(path, "", x)
            if vectors is None:
                return None
            width = x.shape[-1]
            v, h = F.layer_norm(vectors, (width,)), F.layer_norm(x.float(), (width,))
            return table.spread(path, (h @ v.T) / width**0.5)

        return score
