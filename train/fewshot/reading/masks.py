"""Label words of several tokens (PET for SuperGLUE, arXiv:2009.07118): a run of masks, read token by token.

Training reads one pass with as many masks as the longest word has tokens; with CE_y the sum over y's tokens,

    loss = sum_{y' != y} max(0, 1 + CE_y - CE_y')

Prediction trims the run to each word's k tokens and fills it in k passes, each time the mask whose own token is the
most probable (`max-first`), or from the left (`ltr`), or all in one pass (`parallel`); the score is the sum of log p.
Words of equal length share their first pass, so L words of one token cost one pass and not L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from train.fewshot.examples import Example
from train.fewshot.prompts.filled import encode, to_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.reading.reader import MaskReader, inputs_of
from train.steps.evaluate import amp

__all__ = ["Order", "decode", "hinge", "sequence_ce"]

Order = Literal["max-first", "ltr", "parallel"]


def sequence_ce(logits: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """(B, C) `CE_y = -sum_j log p(y_j at mask j)`, from logits (B, k, V) and each label's tokens."""
    log_p = logits.float().log_softmax(-1)
    return torch.stack([-log_p[:, range(len(ids)), list(ids)].sum(1) for ids in words], 1)


def hinge(ce: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows and wrong labels of max(0, 1 + CE_y - CE_y'); ce (B, C), labels (B,)."""
    right = ce.gather(1, labels[:, None])
    wrong = torch.ones_like(ce).scatter(1, labels[:, None], 0)
    return (F.relu(1 + right - ce) * wrong).sum()


@torch.no_grad()
def decode(
    reader: MaskReader,
    template: Template,
    examples: Sequence[Example],
    tokenizer: Any,
    words: Sequence[Sequence[int]],
    *,
    order: Order = "max-first",
    max_length: int = 256,
    size: int = 64,
    precision: str = "fp32",
) -> Tensor:
    """(N, C) log probabilities of the labels' tokens in the masks; `size` rows go through together."""
    reader.eval()
    scores = torch.zeros(len(examples), len(words))
    for k in sorted({len(ids) for ids in words}):
        labels = [c for c, ids in enumerate(words) if len(ids) == k]
        rows = [encode(template.with_masks(k), e, tokenizer, max_length=max_length) for e in examples]
        data = to_dataset(rows, [None] * len(rows), tokenizer, ("", ""))
        target = torch.tensor([words[c] for c in labels])  # (L, k)
        for at, batch in data.batches(size):
            with amp(next(reader.parameters()).device, precision):
                scores[at[:, None], torch.tensor(labels)] = _scores(reader, inputs_of(batch), target, order, size)
    return scores


def _scores(reader: MaskReader, batch: dict[str, Tensor], target: Tensor, order: Order, size: int) -> Tensor:
    """(B, L) sums of log p of each word's tokens `target` (L, k)."""
    count, k = target.shape
    log_p: Tensor = reader(**batch).logits.float().log_softmax(-1)  # (B, k, V)
    own = log_p[:, torch.arange(k), target]  # (B, L, k)
    if order == "parallel" or k == 1:
        return own.sum(-1)
    rows = len(own)
    own, target = own.flatten(0, 1), target.repeat(rows, 1)  # (B L, k)
    scores = []
    for part in torch.split(torch.arange(rows * count), size):
        filled = {name: value[part // count] for name, value in batch.items()}
        scores.append(_fill(reader, filled, target[part], own[part], order))
    return torch.cat(scores).view(rows, count)


def _fill(reader: MaskReader, batch: dict[str, Tensor], target: Tensor, own: Tensor, order: Order) -> Tensor:
    """(P,) sum of log p of `target` (P, k), the masks filled one at a time; `own` (P, k) is from the pass with none."""
    total = torch.zeros(len(target))
    open_ = torch.ones_like(target, dtype=torch.bool)
    ids, at = batch["input_ids"].clone(), batch["mask_at"]
    for step in range(target.shape[1]):
        if step:
            log_p = reader(**{**batch, "input_ids": ids}).logits.float().log_softmax(-1)
            own = log_p.gather(2, target[..., None])[..., 0]
        best = torch.full((len(target),), step) if order == "ltr" else own.masked_fill(~open_, -torch.inf).argmax(1)
        total += own.gather(1, best[:, None])[:, 0]
        open_.scatter_(1, best[:, None], False)
        ids.scatter_(1, at.gather(1, best[:, None]), target.gather(1, best[:, None]))
    return total
