"""From scores to sparse weights."""

from __future__ import annotations

from torch import Tensor

from hub.errors import UsageError


def gate(scores: Tensor, *, top_k: int | None = None, threshold: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Weights (B, E) that sum to one in each row: softmax(scores / temperature) over the best, the rest exactly 0.

    Parameters
    ----------
    scores
        (B, E) logits or log probabilities; -inf rules an expert out.
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
    if bool(scores.isnan().any()) or bool(scores.isneginf().all(-1).any()):
        raise UsageError("a row has NaN scores, or none above -inf", hint="check the scorer's statistics")
    if top_k is not None and not 1 <= top_k <= experts:
        raise UsageError(f"top_k is {top_k} for {experts} experts", hint=f"1 to {experts}")
    if not 0.0 <= threshold < 1.0 or not temperature > 0.0:
        raise UsageError(f"threshold {threshold} or temperature {temperature} is out of range", hint="[0, 1) and > 0")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)  # 0 for a row's best expert
    logits = scores.double() / temperature
    weights = logits.masked_fill(rank >= (top_k or experts), float("-inf")).softmax(-1)
    weights = weights.masked_fill((weights < threshold) & (rank > 0), 0.0)
    return (weights / weights.sum(-1, keepdim=True)).to(scores.dtype)
