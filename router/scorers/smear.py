"""SMEAR: one merged expert a row, by a learned softmax over what the row is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from router.bench import Batch, Bench, Experts
from router.embed import hidden_means
from router.scorer import SHARED, RowScorer, ScorerOptions, Statistics, register
from router.sitewise import learn


class SmearOptions(ScorerOptions):
    """The training of the router."""

    steps: int = Field(200, ge=1, description="steps of training")
    lr: float = Field(1e-2, gt=0, description="learning rate")


@register("smear")
class Smear(RowScorer):
    """`score_e = sqrt(d) u_e . h(x) + b_e`, h(x) the row's mean hidden state, unit length (SMEAR, arXiv 2306.03745).

    Its softmax weighs the experts' effects into one expert for the row, `sum_e w_e D_e`, at the price of one row of any
    mixed batch. The u_e are learned together through the loss, base and experts frozen; so it is fitted anew for one
    more expert.
    """

    Options = SmearOptions
    paper = "arXiv 2306.03745"
    joint = True
    continues = True  # it learns through their loss

    def fit(self, bench: Bench) -> dict[str, Statistics]:
        """Train the router; statistics of an expert are its vector (d,) and bias."""
        bench.need_data()
        names, device = list(bench.experts), bench.model.device
        width = hidden_means(bench.model, next(bench.batches(names[0]))).shape[1]
        weight = nn.Parameter(torch.zeros(len(names), width, device=device))
        bias = nn.Parameter(torch.zeros(len(names), device=device))
        weights: list[Tensor] = []

        def loss(model: PreTrainedModel, batch: Batch, name: str) -> Tensor:
            logits = width**0.5 * hidden_means(model, batch) @ weight.T + bias
            weights[:] = [logits.softmax(-1)[:, None]]  # (B, 1, E)
            return bench.loss(model, batch, name)

        options = self.options
        learn(
            replace(bench, loss=loss),
            bench.experts,
            lambda _path, _x: weights[0],
            [weight, bias],
            names=names,
            steps=options.steps,
            lr=options.lr,
        )
        return {
            name: {"weight": weight.detach()[i].cpu(), "bias": bias.detach()[i].cpu()} for i, name in enumerate(names)
        }

    def wanted(self, expert: str) -> tuple[str, ...]:
        """The expert's vector and bias."""
        return () if expert == SHARED else ("weight", "bias")

    def score(
        self, model: PreTrainedModel, batch: Batch, experts: Experts, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """Logits (B, E)."""
        h = hidden_means(model, batch)
        weight = torch.stack([statistics[name]["weight"] for name in experts]).to(h)
        bias = torch.stack([statistics[name]["bias"] for name in experts]).to(h)
        scores: Tensor = h.shape[1] ** 0.5 * h @ weight.T + bias
        return scores
