"""The next token of each row, from its own stream of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
)

from router.engine.grammar import Constraint
from router.engine.request import Request


def choose(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """A token a row from logits (B, V): the best, or for a row with a `Sampler` what that says; None for one of NaN."""
    best, tokens = logits.max(-1)  # NaN goes through max
    chosen: list[int | None] = tokens.tolist()
    broken = best.isnan().tolist()
    for row, sampler in enumerate(samplers):
        if broken[row]:
            chosen[row] = None
        elif sampler is not None:
            chosen[row] = sampler(logits[row])
    return chosen


class CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """Logits less `frequency` for each time that a token was written, and less `presence` if it was at all.

    `start` is where what was written begins in the ids.
    """

    def __init__(self, frequency: float, presence: float, start: int) -> None:
        self.frequency, self.presence, self.start = frequency, presence, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V) after ids (1, T)."""
        counts = torch.bincount(input_ids[0, self.start :], minlength=scores.shape[-1]).to(scores)
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Sampler:
    """Sampling with a temperature from the smallest set of tokens whose probability reaches top_p (arXiv 1904.09751).

    Penalties and biases change the logits first; top_k and min_p (arXiv 2407.01082) leave out tokens before top_p does.
    A row's numbers come from its seed alone: `u ~ U(0, 1)`, and the token where the cumulative probability passes u.
    With temperature 0 it is the best token of what penalties and biases have left. A grammar leaves out tokens before
    all of that.
    """

    def __init__(self, request: Request, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self.constraint = constraint
        self.temperature, self.top_p = request.temperature, request.top_p
        self._ids = list(prompt)
        self._changes, self._cuts = _changes(request, len(prompt)), _cuts(request)
        self._stream = torch.Generator().manual_seed(request.seed % 2**63)

    @classmethod
    def of(cls, request: Request, prompt: Sequence[int], constraint: Constraint | None = None) -> Sampler | None:
        """What a request needs; None where its tokens are just the best ones."""
        needed = request.temperature > 0 or constraint is not None or _changes(request, 0)
        return cls(request, prompt, constraint) if needed else None

    def __call__(self, logits: Tensor) -> int | None:
        """A token for logits (V,); None where the grammar allows none."""
        if self.constraint is not None:
            masked = self.constraint.mask(logits)
            if masked is None:
                return None
            logits = masked
        if self._changes:
            ids = torch.tensor([self._ids], dtype=torch.long, device=logits.device)
            logits = self._changes(ids, logits[None])[0]
        token = self._draw(logits) if self.temperature > 0 else int(logits.argmax())
        self._ids.append(token)
        if self.constraint is not None:
            self.constraint.take(token)
        return token

    def _draw(self, logits: Tensor) -> int:
        scores = logits.double() / self.temperature
        if self._cuts:
            scores = self._cuts(torch.empty(1, 0, dtype=torch.long, device=scores.device), scores[None])[0]
        p, tokens = scores.softmax(-1).sort(descending=True, stable=True)
        total = p.cumsum(-1)
        kept = int((total < self.top_p).sum()) + 1
        total = total[:kept]
        u = torch.rand((), generator=self._stream, dtype=torch.float64).item() * float(total[-1])
        return int(tokens[min(int((total <= u).sum()), kept - 1)])


def _changes(request: Request, start: int) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if request.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
    if request.frequency_penalty or request.presence_penalty:
        found.append(CountPenalty(request.frequency_penalty, request.presence_penalty, start))
    if request.logit_bias:
        found.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in request.logit_bias]))
    return found


def _cuts(request: Request) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if request.top_k:
        found.append(TopKLogitsWarper(request.top_k))
    if request.min_p:
        found.append(MinPLogitsWarper(request.min_p))
    return found


def best_tokens(logits: Tensor, chosen: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of the chosen token, and the `count` best tokens with theirs, from logits (V,)."""
    log_p = logits.log_softmax(-1)
    values, tokens = log_p.topk(min(count, len(log_p)))
    return float(log_p[chosen]), list(zip(tokens.tolist(), values.tolist(), strict=True))
