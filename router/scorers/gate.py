"""A gate learned at each site, for each token or each layer: mixtures of LoRA experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from router.bench import Bench, sites_of
from router.scorer import ScorerOptions, SiteScorer, SiteScores, Statistics, register
from router.sitewise import SiteVectors, learn


class GateOptions(ScorerOptions):
    """What a gate reads, and its training."""

    per: Literal["token", "layer"] = Field("token", description="token: reads what enters the site; layer: constant")
    steps: int = Field(200, ge=1, description="steps of training")
    lr: float = Field(1e-2, gt=0, description="learning rate")
    balance: float = Field(0.01, ge=0, description="weight of the load-balance loss, for gates per token")


@register("gate")
class LearnedGate(SiteScorer):
    """`score_e = u_e . x + b_e` at each site (MoLE, arXiv 2404.13628; X-LoRA, arXiv 2402.07148); per layer b_e alone.

    All experts' gates are learned together on their mixed rows, base and experts frozen, plus the load-balance loss
    (Switch, arXiv 2101.03961) mean over sites of `E sum_e f_e P_e`, with f_e the share of tokens whose best expert is e
    and P_e its mean weight; 1 where the load is even. One more expert means fitting again.
    """

    Options = GateOptions
    paper = "arXiv 2404.13628, 2402.07148"
    joint = True

    def fit(self, bench: Bench) -> dict[str, Statistics]:
        """Train all gates; statistics of an expert are its columns at each site."""
        bench.need_data()
        names, device = list(bench.experts), bench.model.device
        widths = sites_of(bench.model, bench.experts)
        bias = {path: nn.Parameter(torch.zeros(len(names), device=device)) for path in widths}
        weight = {path: nn.Parameter(torch.zeros(len(names), d, device=device)) for path, d in widths.items()}
        token = self.options.per == "token"
        loads: list[Tensor] = []

        def gate(path: str, x: Tensor) -> Tensor:
            logits = x.float() @ weight[path].T + bias[path] if token else bias[path][None, None]
            weights = logits.softmax(-1)  # (B, T, E) or (1, 1, E)
            # Kept for the load-balance loss of this step: a constant gate has no load to balance.
            if token:
                best = torch.zeros_like(weights).scatter(-1, weights.argmax(-1, keepdim=True), 1.0)
                loads.append(len(names) * (best.mean((0, 1)) * weights.mean((0, 1))).sum())
            return weights

        def balance() -> Tensor:
            mean: Tensor = self.options.balance * torch.stack(loads).mean()
            loads.clear()
            return mean

        learn(
            bench,
            bench.experts,
            gate,
            [*bias.values(), *(weight.values() if token else ())],
            names=names,
            steps=self.options.steps,
            lr=self.options.lr,
            penalty=balance if token else None,
        )
        return {
            name: {f"{path}/bias": bias[path].detach()[i].cpu() for path in widths}
            | ({f"{path}/weight": weight[path].detach()[i].cpu() for path in widths} if token else {})
            for i, name in enumerate(names)
        }

    def scores(self, statistics: Mapping[str, Statistics]) -> SiteScores:
        """Logits of the gates."""
        table = SiteVectors(statistics)

        def score(path: str, x: Tensor) -> Tensor | None:
            bias = table.at(path, "bias", x)
            if bias is None:
                return None
            weight = table.at(path, "weight", x)
            return bias[None, None] if weight is None else x.float() @ weight.T + bias

        return score
