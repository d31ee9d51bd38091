"""Nearness of a row to what each expert was made for: c-BTM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from compose.base.text_config import fact
from hub.errors import UsageError
from router.bench import Batch, Bench, Experts
from router.embed import hidden_means, token_counts
from router.gating import Gating
from router.scorer import SHARED, RowScorer, ScorerOptions, Statistics, register

_SMOOTH = 0.1  # added to each token's count


class CentroidOptions(ScorerOptions):
    """What a row is embedded by."""

    embed: Literal["hidden", "tokens"] = Field(
        "hidden", description="hidden: the bare base's last hidden states, averaged; tokens: counts of token ids"
    )


@register("centroid")
class Centroid(RowScorer):
    """`score_e = -||h(x) - mu_e||^2` with h(x) the unit-length embedding of the row (c-BTM, arXiv 2303.14177).

    With ``embed: tokens`` `score_e = mean_t log p_e(x_t)` under the expert's smoothed token frequencies, and no model
    runs. The statistics of an expert are sums over its own rows, so a member is added by one pass over its rows.
    """

    Options = CentroidOptions
    paper = "arXiv 2303.14177"
    gating = Gating(temperature=0.1)

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """Mean (d,) of the rows' embeddings, or token counts (V,)."""
        if self.options.embed == "tokens":
            vocabulary = int(fact(bench.model.config, "vocab_size"))
            counts = [token_counts(batch, vocabulary).sum(0) for batch in bench.batches(expert)]
            return {"tokens": torch.stack(counts).sum(0).float().cpu()}
        points = torch.cat([hidden_means(bench.model, batch) for batch in bench.batches(expert)])  # (N, d)
        return {"mean": points.mean(0).float().cpu()}

    def wanted(self, expert: str) -> tuple[str, ...]:
        """Counts of tokens, or the mean."""
        if expert == SHARED:
            return ()
        return ("tokens",) if self.options.embed == "tokens" else ("mean",)

    def score(
        self, model: PreTrainedModel, batch: Batch, experts: Experts, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """Scores (B, E)."""
        known = [statistics[name] for name in experts]
        if self.options.embed == "tokens":
            return _by_frequency(batch, known)
        h = hidden_means(model, batch).double()  # (B, d)
        centres = torch.stack([s["mean"] for s in known]).to(h)  # (E, d)
        if centres.shape[1] != h.shape[1]:
            raise UsageError(
                f"this router was fitted on hidden states of {centres.shape[1]} numbers, the base has {h.shape[1]}",
                hint="fit it again on this base: hub route fit",
            )
        return -(h[:, None] - centres).square().sum(-1)


def _by_frequency(batch: Batch, known: Sequence[Statistics]) -> Tensor:
    """Mean log probability of each row's tokens under each expert's smoothed frequencies (B, E)."""
    counts = torch.stack([s["tokens"] for s in known]).double() + _SMOOTH  # (E, V)
    log_p = (counts / counts.sum(1, keepdim=True)).log().to(batch.input_ids.device)
    seen = token_counts(batch, log_p.shape[1]).double()  # (B, V)
    return (seen @ log_p.T) / seen.sum(1, keepdim=True).clamp_min(1)
