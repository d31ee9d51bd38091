"""Adapting: one LoRA on the upper blocks learns from every reading of the examples at once.

A row is one example in one template, or plain. Rows with a mask are tuned by prompt (arXiv:2012.15723), and all rows by
supervised contrast (arXiv:2004.11362), with unit mean states h and the other rows P of the batch that share the label:

    CE(label words at the mask, y)  -  a/|P| sum_{p in P} log softmax_{j != i}(h_i . h_j / tau)_p,   tau = 0.1, a = 1/4

The lower blocks run once (see `replay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.fewshot.job import Job
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.reading.reader import MaskReader, mean_state
from train.fewshot.reading.views import joined, view_dataset
from train.fewshot.tuning.prompt_tuning import TunedAdapter, tune
from train.method import Method

__all__ = ["MANY", "WordsAndContrast", "adapt", "contrast"]

TAU = 0.1
_WEIGHT = 0.25  # a: at one the contrast, whose gradient is 1/tau times as steep, leaves the words untrained
MANY = 10  # classes from which batches are larger, and plain texts alone are learned from: there are enough of them
_EPOCHS = (8, 4)  # with few classes and with many, between the least and the most steps
_STEPS = (30, 80)


def contrast(states: Tensor, labels: Tensor, tau: float = TAU) -> Tensor:
    """The contrastive term, summed over the rows that have another of their label; states (B, d) unit, labels (B,)."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_p = (states @ states.T / tau).masked_fill(itself, -1e9).log_softmax(1)
    same = (labels[:, None] == labels) & ~itself
    count = same.sum(1)
    return -((log_p * same).sum(1) / count.clamp(min=1)).sum()


class WordsAndContrast(Method):
    """Both terms, where a model gives `.logits` (B, C), `.states` (B, d), and rows say their `view`: 0 is plain."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum over rows."""
        out = model(**{name: value for name, value in batch.items() if name not in ("labels", "view")})
        loss = _WEIGHT * contrast(out.states, batch["labels"])
        masked = batch["view"] > 0
        if out.logits is not None and bool(masked.any()):
            loss = loss + F.cross_entropy(out.logits[masked].float(), batch["labels"][masked], reduction="sum")
        return loss


class _WordsAndStates(nn.Module):
    """Label words at the mask and the mean state of each row."""

    def __init__(self, reader: MaskReader, scores: WordScores | None) -> None:
        super().__init__()
        self.reader, self.scores = reader, scores

    def forward(self, mask_at: Tensor, row: Tensor | None = None, **inputs: Tensor) -> Any:
        """`.logits` (B, C), None without words, and `.states` (B, d)."""
        out = self.reader(mask_at, row, **inputs, hidden=True)
        states = mean_state(out.hidden.float(), inputs["attention_mask"])
        logits = None if self.scores is None else self.scores(out.logits[:, 0])
        return SimpleNamespace(logits=logits, states=states)


def adapt(job: Job, rows: Sequence[int], scores: WordScores | None, *, name: str, seconds: float) -> TunedAdapter:
    """Train an adapter called `name` on some of the examples, for `seconds` at most; it ends active and frozen.

    Without label words the contrast is all that is learned.
    """
    many = len(job.labels) >= MANY
    templates, batch = ((None,), 64) if many else ((None, *job.patterns), 24)
    readings = len(rows) * len(templates)
    steps = min(max(_EPOCHS[many] * readings // batch, _STEPS[0]), _STEPS[1])
    examples = [job.examples[i] for i in rows]
    sets = [view_dataset(t, examples, job.tokenizer, job.labels, max_length=job.max_length) for t in templates]
    return tune(
        job.model,
        lambda reader: _WordsAndStates(reader, scores),
        joined(sets),
        job.config(steps, batch=batch),
        name=name,
        method_of=lambda _reader: WordsAndContrast(),
        seconds=seconds,
    )
