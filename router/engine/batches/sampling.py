"""The next token of each row, from its own stream of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """A token a row from logits (B, V): the best, or for a row with a `Sampler` a random one; None for a row of NaN."""
    best, tokens = logits.max(-1)  # NaN goes through max
    chosen: list[int | None] = tokens.tolist()
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            chosen[row] = sampler(logits[row])
    for row in best.isnan().nonzero().flatten().tolist():
        chosen[row] = None
    return chosen


class Sampler:
    """Sampling with a temperature from the smallest set of tokens whose probability reaches top_p (arXiv 1904.09751).

    A row's numbers come from its seed alone: `u ~ U(0, 1)`, and the token where the cumulative probability passes u.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._stream = torch.Generator().manual_seed(seed % 2**63)

    def __call__(self, logits: Tensor) -> int:
        """A token for logits (V,)."""
        p, tokens = (logits.double() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        total = p.cumsum(-1)
        kept = int((total < self.top_p).sum()) + 1
        total = total[:kept]
        u = torch.rand((), generator=self._stream, dtype=torch.float64).item() * float(total[-1])
        return int(tokens[min(int((total <= u).sum()), kept - 1)])


def best_tokens(logits: Tensor, chosen: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of the chosen token, and the `count` best tokens with theirs, from logits (V,)."""
    log_p = logits.log_softmax(-1)
    values, tokens = log_p.topk(min(count, len(log_p)))
    return float(log_p[chosen]), list(zip(tokens.tolist(), values.tolist(), strict=True))
