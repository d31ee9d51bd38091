"""Likelihood of the row under each expert: the DEMix posterior, by row."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from router.bench import Batch, Experts
from router.ensemble import posterior as bayes
from router.ensemble.belief import belief
from router.ensemble.experts import expert_log_probs
from router.gating import Gating
from router.scorer import RowScorer, ScorerOptions, Statistics, register


class LikelihoodOptions(ScorerOptions):
    """How much of a row is read, and how fast it is forgotten."""

    tokens: int | None = Field(None, ge=2, description="read only so many tokens of a row [all]")
    gamma: float = Field(1.0, ge=0, le=1, description="discount of older tokens; 1 is Bayes, 0 the last token alone")
    hedge: bool = Field(False, description="mix slower and faster weights by how they predict; for texts of no member")

    @model_validator(mode="after")
    def _one_pace(self) -> LikelihoodOptions:
        if self.hedge and self.gamma != 1.0:
            raise ValueError("gamma sets the pace of the weights, and hedged ones choose their own")
        return self


@register("likelihood")
class Likelihood(RowScorer):
    """`score_e = sum_t gamma^(T-t) log p_e(x_t | x_<t)`, in nats (DEMix layers, arXiv 2108.05036).

    Softmax of it is the posterior over experts under a uniform prior. It needs no statistics and reads each row once
    with every expert, folded into one batch. See `router.ensemble.demix` for the mixture it belongs to.
    """

    Options = LikelihoodOptions
    paper = "arXiv 2108.05036"
    needs_data = False
    continues = True

    def check(self, gating: Gating, experts: int) -> None:
        """Refuse a temperature beside hedged weights, too."""
        super().check(gating, experts)
        belief(bayes.log_prior(None, 1), 1, temperature=gating.temperature, hedge=self.options.hedge)

    def score(
        self, model: PreTrainedModel, batch: Batch, experts: Experts, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """Log likelihood of each row under each expert (B, E), float64; log of the weights where they are hedged."""
        ids, mask = batch.input_ids[:, : self.options.tokens], batch.attention_mask[:, : self.options.tokens]
        log_probs, valid = expert_log_probs(model, list(experts.values()), ids, mask)
        values = log_probs.permute(1, 2, 0)  # (B, T-1, E)
        if self.options.hedge:
            prior = bayes.log_prior(None, len(experts)).to(values.device)
            return belief(prior, len(values), hedge=True).read(values, valid)[1].log_weights
        _, after = bayes.evidence(values, valid, gamma=self.options.gamma)
        return after
