"""From scores to sparse weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hub.errors import UsageError


def gate(scores: Tensor, *, top_k: int | None = None, threshold: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Weights (..., E) that sum to one in each row: `softmax(scores / temperature)` over the best, the rest exactly 0.

    Parameters
    ----------
    scores
        (..., E) logits or log probabilities, per row or per token; -inf rules an expert out.
    top_k
        How many experts a row keeps at most; of equal scores the earlier expert stays.
    threshold
        Weights under it become 0 and the others share theirs; the best expert always stays.

    Raises
    ------
    UsageError
        NaN scores, a row without any expert, top_k that is not in 1..E, a threshold outside [0, 1), a temperature <= 0.
    """
    experts = scores.shape[-1]
    if experts == 0:
        raise UsageError("there are no experts to choose from", hint="give one member or more")
    if top_k is not None and not 1 <= top_k <= experts:
        raise UsageError(f"top_k is {top_k} for {experts} experts", hint=f"1 to {experts}")
    if not 0.0 <= threshold < 1.0 or not temperature > 0.0:
        raise UsageError(f"threshold {threshold} or temperature {temperature} is out of range", hint="[0, 1) and > 0")
    best = scores.amax(-1, keepdim=True)  # NaN where any score is
    if not bool(torch.isfinite(best).all()):
        raise UsageError("a row has NaN scores, or none above -inf", hint="check the scorer's statistics")
    logits = scores / temperature
    # Ruled out before the softmax, so that those kept share all the weight.
    if top_k is not None and top_k < experts:
        logits = logits.masked_fill(~_highest(scores, top_k), float("-inf"))
    weights = logits.softmax(-1)
    if threshold > 0.0:
        # The best expert stays whatever its weight: a row is never left without any.
        light = (weights < threshold) & ~_highest(scores, 1)
        weights = weights.masked_fill(light, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


def _highest(scores: Tensor, k: int) -> Tensor:
    """Which entries are the k highest of their row; of equal ones the earlier. No sort: this runs at every site."""
    last = scores.topk(k, dim=-1).values[..., -1:]
    above, equal = scores > last, scores == last
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


@dataclass(frozen=True)
class Gating:
    """The options of `gate`, which it applies to the scores it is called with; see there."""

    top_k: int | None = None
    threshold: float = 0.0
    temperature: float = 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Sparse weights of the same shape as the scores (..., E)."""
        return gate(scores, top_k=self.top_k, threshold=self.threshold, temperature=self.temperature)

    def check(self, experts: int) -> Gating:
        """Itself, if these options fit so many experts; UsageError otherwise."""
        gate(torch.zeros(1, experts), top_k=self.top_k, threshold=self.threshold, temperature=self.temperature)
        return self
