"""Which expert's texts a row is one of: a linear discriminant over every layer of the bare base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hub.errors import UsageError
from router.bench import Batch, Bench, Experts
from router.embed import layer_means
from router.gating import Gating
from router.scorer import SHARED, RowScorer, ScorerOptions, Statistics, register

_RANK = 128  # directions of a member's scatter that are kept; the rest is spread over all directions alike
_SHRINK = 0.1  # of the pooled covariance towards a multiple of the identity: it has to be inverted
_WIDE = 4096  # numbers of an embedding above which the covariance is never formed


class DiscriminantOptions(ScorerOptions):
    """What a row is embedded by."""

    layers: int = Field(
        8, ge=1, description="hidden states read, spread evenly from the last to the embeddings; 1 is the last alone"
    )


@register("discriminant")
class Discriminant(RowScorer):
    """`score_e = h^T S^-1 mu_e - mu_e^T S^-1 mu_e / 2`: Fisher's linear discriminant, log p(e | x) but for a constant.

    h(x) holds the bare base's mean hidden states of several layers side by side: the last ones tell what a text is
    about, the first ones its form, and tasks differ by both. mu_e is the mean over the expert's texts, S the covariance
    that the experts share, pooled from each one's own scatter and shrunk a tenth towards a multiple of the identity.

    An expert is known by its mean, the number of its texts and the leading directions of their scatter, so a member is
    added by one pass over its own texts; S is solved for when a router is first asked.
    """

    Options = DiscriminantOptions
    paper = "Fisher 1936, doi 10.1111/j.1469-1809.1936.tb02137.x"
    gating = Gating(top_k=1)

    def __init__(self, options: ScorerOptions | None = None) -> None:
        super().__init__(options)
        self._solved: tuple[list[Statistics], Tensor, Tensor] | None = None

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """Mean (D,), count, scatter as its leading rows R (r, D) by size, `R^T R`, and the trace of what they leave."""
        layers = self.options.layers
        points = torch.cat([layer_means(bench.model, batch, layers).cpu() for batch in bench.batches(expert)])  # (N, D)
        mean = points.mean(0)
        _, sizes, directions = torch.linalg.svd((points - mean).double(), full_matrices=False)
        factor = (sizes[:_RANK, None] * directions[:_RANK]).half()
        return {
            "mean": mean.float(),
            "count": torch.tensor(float(len(points))),
            "factor": factor.contiguous(),
            "rest": sizes[_RANK:].square().sum().float(),
        }

    def wanted(self, expert: str) -> tuple[str, ...]:
        """The moments of an expert's texts."""
        return () if expert == SHARED else ("mean", "count", "factor", "rest")

    def score(
        self, model: PreTrainedModel, batch: Batch, experts: Experts, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """Scores (B, E), float64."""
        h = layer_means(model, batch, self.options.layers).double()  # (B, D)
        weight, bias = self._solve([statistics[name] for name in experts])
        if len(weight) != h.shape[1]:
            raise UsageError(
                f"this router was fitted on {len(weight)} numbers a row, the base gives {h.shape[1]}",
                hint="fit it again on this base: hub route fit",
            )
        return h @ weight.to(h) + bias.to(h)

    def _solve(self, known: list[Statistics]) -> tuple[Tensor, Tensor]:
        """`S^-1 mu` (D, E) and `-mu S^-1 mu / 2` (E,); kept for the next batch of the same members."""
        if self._solved is None or not _same(self._solved[0], known):
            means = torch.stack([s["mean"] for s in known]).double()  # (E, D)
            if any(s["factor"].shape[1:] != means.shape[1:] for s in known):
                raise UsageError("mean and factor of this router are of different widths", hint="fit it again")
            with torch.inference_mode(False):
                weight = _inverse_times(known, means.T)
                self._solved = known, weight, -0.5 * (means.T * weight).sum(0)
        return self._solved[1:]


def _same(before: Sequence[Statistics], now: Sequence[Statistics]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _inverse_times(known: Sequence[Statistics], right: Tensor) -> Tensor:
    """`S^-1 right` for right (D, E), with `S = level I + F^T F` the shrunk pooled covariance and F (K, D).

    Where D is small S itself is solved; else `(level I + F^T F)^-1 = (I - F^T (level I + F F^T)^-1 F) / level`, with
    fewer directions of each expert where there are many, so that K stays within bounds.
    """
    width, most = len(right), max(1, _WIDE // len(known))
    # Each expert's scatter, by its leading directions; the pooled covariance divides by the degrees of freedom.
    whole = [s["factor"].double() for s in known]
    factors = whole if width <= _WIDE else [rows[:most] for rows in whole]
    degrees = max(1.0, sum(float(s["count"]) for s in known) - len(known))
    rests = sum(max(0.0, float(s["rest"])) for s in known)
    trace = (sum(float(rows.square().sum()) for rows in whole) + rests) / degrees
    F = torch.cat(factors) * ((1 - _SHRINK) / degrees) ** 0.5
    # What the directions leave out and the shrinkage both go to the diagonal, so that the trace stays the same.
    left = trace * (1 - _SHRINK) - float(F.square().sum())  # the trace outside the kept directions
    level = max((left + _SHRINK * trace) / width, 1e-12)
    # Whichever of the two systems is smaller is solved: (D, D), or Woodbury's (K, K).
    if width <= _WIDE:
        covariance = F.T @ F
        covariance.diagonal().add_(level)
        solved: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(covariance))
    else:
        inner = F @ F.T
        inner.diagonal().add_(level)
        solved = (right - F.T @ torch.cholesky_solve(F @ right, torch.linalg.cholesky(inner))) / level
    return solved
