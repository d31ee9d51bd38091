"""Label words of several tokens (PET for SuperGLUE, arXiv:2009.07118): a run of masks, read token by token.

Training reads one pass with as many masks as the longest word has tokens; with CE_y the sum over y's tokens,

    loss = sum_{y' != y} max(0, 1 + CE_y - CE_y')

Prediction trims the run to each word's k tokens and fills it in k passes, each time the mask whose own token is the
most probable (`max-first`), or from the left (`ltr`), or all in one pass (`parallel`); the score is the sum of log p.
All examples and words of a batch go through together.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.fewshot.examples import Example
from train.fewshot.head import choose_head
from train.fewshot.job import Job, Learned
from train.fewshot.prompts import encode, to_dataset
from train.fewshot.reader import MaskReader, inputs_of
from train.fewshot.splits import folds
from train.fewshot.template import Template
from train.fewshot.tuning import tune
from train.fewshot.verbalizer import WordScores
from train.fewshot.views import View
from train.method import Method

__all__ = ["Hinge", "MultiMaskModel", "decode", "hinge", "multi_mask", "sequence_ce"]

Order = Literal["max-first", "ltr", "parallel"]


def sequence_ce(logits: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """(B, C) CE_y = -sum_j log p(y_j at mask j), from logits (B, k, V) and each label's tokens."""
    log_p = logits.float().log_softmax(-1)
    return torch.stack([-log_p[:, range(len(ids)), list(ids)].sum(1) for ids in words], 1)


def hinge(ce: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows and wrong labels of max(0, 1 + CE_y - CE_y'); ce (B, C), labels (B,)."""
    right = ce.gather(1, labels[:, None])
    wrong = torch.ones_like(ce).scatter(1, labels[:, None], 0)
    return (F.relu(1 + right - ce) * wrong).sum()


class MultiMaskModel(nn.Module):
    """Label logits -CE_y (B, C) of prompts with a run of masks."""

    def __init__(self, reader: MaskReader, words: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.reader, self.words = reader, words

    def forward(self, mask_at: Tensor, row: Tensor | None = None, **inputs: Tensor) -> Any:
        """`.logits` (B, C)."""
        return SimpleNamespace(logits=-sequence_ce(self.reader(mask_at, row, **inputs).logits, self.words))


class Hinge(Method):
    """The multi-mask loss, where a model's logits are -CE."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum over rows."""
        return hinge(-model(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"])


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
) -> Tensor:
    """(N, C) log probabilities of the labels' tokens in the masks."""
    reader.eval()
    found = torch.zeros(len(examples), len(words))
    for k in sorted({len(ids) for ids in words}):
        labels = [c for c, ids in enumerate(words) if len(ids) == k]
        rows = [encode(template.with_masks(k), e, tokenizer, max_length=max_length) for e in examples]
        pairs = [(i, c) for i in range(len(rows)) for c in labels]
        data = to_dataset([rows[i] for i, _ in pairs], [None] * len(pairs), tokenizer, ("", ""))
        target = torch.tensor([words[c] for _, c in pairs])  # (P, k)
        for at, batch in data.batches(size):
            scores = _fill(reader, inputs_of(batch), target[at], order)
            for pair, score in zip(at.tolist(), scores.tolist(), strict=True):
                i, c = pairs[pair]
                found[i, c] = score
    return found


def _fill(reader: MaskReader, batch: dict[str, Tensor], target: Tensor, order: Order) -> Tensor:
    """(P,) sum of log p of `target` (P, k), the masks filled one at a time."""
    count = target.shape[1]
    total = torch.zeros(len(target))
    open_ = torch.ones_like(target, dtype=torch.bool)
    ids, at = batch["input_ids"].clone(), batch["mask_at"]
    for step in range(1 if order == "parallel" else count):
        log_p = reader(**{**batch, "input_ids": ids}).logits.float().log_softmax(-1)
        own = log_p.gather(2, target[..., None])[..., 0]  # (P, k)
        if order == "parallel":
            return cast("Tensor", own.sum(1))
        best = torch.full((len(target),), step) if order == "ltr" else own.masked_fill(~open_, -torch.inf).argmax(1)
        total += own.gather(1, best[:, None])[:, 0]
        open_.scatter_(1, best[:, None], False)
        ids.scatter_(1, at.gather(1, best[:, None]), target.gather(1, best[:, None]))
    return total


def multi_mask(job: Job, steps: int = 40) -> Learned:
    """Train with the words whole, however many tokens they have; a head then reads the adapted states.

    The published classifier needs one pass a text: `decode` scores the words themselves.
    """
    words = job.verbalizer().tokens(job.tokenizer)
    template = Template.parse(job.patterns[0]).with_masks(max(map(len, words)))
    rows = [encode(template, e, job.tokenizer, max_length=job.max_length) for e in job.examples]
    data = to_dataset(rows, [e.label for e in job.examples], job.tokenizer, job.labels)
    config = job.config(steps)
    tuned = tune(
        job.model,
        WordScores(tuple((ids[0],) for ids in words)),
        data,
        config,
        name="fewshot",
        method_of=lambda _reader: Hinge(),
        model_of=lambda reader: MultiMaskModel(reader, words),
        seconds=job.left * 0.8,
    )
    views = (View(), View(job.patterns[0], "mask"))
    classifier = job.classifier(views)
    parts = folds(job.examples, 4, job.seed)
    features = classifier.features(job.examples)
    classifier.head, accuracy = choose_head(features, job.answers, len(job.labels), parts)
    facts = {
        "templates": [template.format()],
        "tokens": [len(w) for w in words],
        "training_accuracy": round(accuracy, 4),
    }
    return Learned(classifier, tuned.adapter, "multi-mask", config, tuned.result, facts)
