"""Nearness of a row to what each expert was made for: c-BTM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hub.errors import UsageError
from router.bench import Batch, Bench, Experts
from router.embed import hidden_means, token_counts
from router.gating import Gating
from router.scorer import SHARED, RowScorer, ScorerOptions, Statistics, register

_SHRINK = 0.1  # of the pooled covariance towards a multiple of the identity: it has to be inverted
_SMOOTH = 0.1  # added to each token's count


class CentroidOptions(ScorerOptions):
    """What a row is embedded by, and what is near."""

    embed: Literal["hidden", "tokens"] = Field(
        "hidden", description="hidden: the bare base's last hidden states, averaged; tokens: counts of token ids"
    )
    distance: Literal["euclidean", "mahalanobis"] = Field(
        "euclidean", description="of hidden: between unit vectors as in c-BTM, or under the experts' pooled covariance"
    )


@register("centroid")
class Centroid(RowScorer):
    """score_e = -||h(x) - mu_e||^2 with h(x) the unit-length embedding of the row (c-BTM, arXiv 2303.14177).

    With ``distance: mahalanobis`` the distance is (h - mu_e)^T S^-1 (h - mu_e) / 2 under the covariance S that the
    experts share, pooled from their own scatter: a linear discriminant, sharper where tasks are alike. With
    ``embed: tokens`` score_e = mean_t log p_e(x_t) under the expert's smoothed token frequencies, and no model runs.
    The statistics of an expert are sums over its own rows, so a member is added by one pass over its rows.
    """

    Options = CentroidOptions
    paper = "arXiv 2303.14177"
    gating = Gating(temperature=0.1)

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """Mean (d,), scatter (d, d) and count of the rows' embeddings, or token counts (V,)."""
        if self.options.embed == "tokens":
            vocabulary = int(bench.model.config.get_text_config().vocab_size)
            counts = [token_counts(batch, vocabulary).sum(0) for batch in bench.batches(expert)]
            return {"tokens": torch.stack(counts).sum(0).float().cpu()}
        points = torch.cat([hidden_means(bench.model, batch) for batch in bench.batches(expert)]).cpu()  # (N, d)
        mean = points.mean(0)
        found = {"mean": mean.float(), "count": torch.tensor(float(len(points)))}
        if self.options.distance == "mahalanobis":
            centred = points - mean
            found["scatter"] = (centred.T @ centred).float()
        return found

    def wanted(self, expert: str) -> tuple[str, ...]:
        """Counts of tokens, or the moments that the distance asks for."""
        if expert == SHARED:
            return ()
        if self.options.embed == "tokens":
            return ("tokens",)
        return ("mean", "count", "scatter") if self.options.distance == "mahalanobis" else ("mean",)

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
        differences = h[:, None] - centres  # (B, E, d)
        if self.options.distance == "euclidean":
            return -differences.square().sum(-1)
        scores: Tensor = -0.5 * torch.einsum("bed,df,bef->be", differences, _precision(known).to(h), differences)
        return scores


def _precision(known: Sequence[Statistics]) -> Tensor:
    """Inverse of the pooled covariance (d, d), shrunk so that it exists."""
    scatter = torch.stack([s["scatter"] for s in known]).sum(0).double()
    degrees = max(1.0, float(sum(float(s["count"]) for s in known)) - len(known))
    pooled = scatter / degrees
    level = pooled.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(len(pooled), dtype=pooled.dtype)
    precision: Tensor = torch.linalg.inv((1 - _SHRINK) * pooled + _SHRINK * level * eye)
    return precision


def _by_frequency(batch: Batch, known: Sequence[Statistics]) -> Tensor:
    """Mean log probability of each row's tokens under each expert's smoothed frequencies (B, E)."""
    counts = torch.stack([s["tokens"] for s in known]).double() + _SMOOTH  # (E, V)
    log_p = (counts / counts.sum(1, keepdim=True)).log().to(batch.input_ids.device)
    seen = token_counts(batch, log_p.shape[1]).double()  # (B, V)
    return (seen @ log_p.T) / seen.sum(1, keepdim=True).clamp_min(1)
