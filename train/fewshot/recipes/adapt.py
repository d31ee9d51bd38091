"""Adapting: one LoRA on the upper blocks learns from every reading of the examples at once.

A row is one example in one template, or plain. Rows with a mask are tuned by prompt (arXiv:2012.15723), and all rows by
supervised contrast (arXiv:2004.11362), with unit mean states h and the other rows P of the batch that share the label:

    CE(label words at the mask, y)  -  a/|P| sum_{p in P} log softmax_{j != i}(h_i . h_j / tau)_p,   tau = 0.1, a = 1/4

The lower blocks run once (see `replay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.fewshot.examples import Example
from train.fewshot.job import Job
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.reading.reader import MaskReader, mean_state
from train.fewshot.reading.views import joined, view_dataset
from train.fewshot.recipes.readings import name_texts
from train.fewshot.tuning.prompt_tuning import TunedAdapter, tune
from train.method import Method

__all__ = ["MANY", "Plan", "WordsAndContrast", "adapt", "contrast"]

TAU = 0.1
_WEIGHT = 0.25  # a: at one the contrast, whose gradient is 1/tau times as steep, leaves the words untrained
MANY = 10  # classes from which batches are larger, and plain texts alone are learned from: there are enough of them
_EPOCHS = (8, 4)  # with few classes and with many, between the least and the most steps
_STEPS = (20, 60)
_UPPER = 3  # blocks that learn label words
_FEWEST = 6  # steps; fewer are not worth a trial
_ROWS = 24  # examples; of fewer nothing is held out that would tell an adapter that helps from one that does not
_SHARE = 0.9  # of what is left of the budget


def contrast(states: Tensor, labels: Tensor, tau: float = TAU) -> Tensor:
    """The contrastive term, summed over the rows that have another of their label; states (B, d) unit, labels (B,)."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_p = (states @ states.T / tau).masked_fill(itself, -1e9).log_softmax(1)
    same = (labels[:, None] == labels) & ~itself
    count = same.sum(1)
    return -((log_p * same).sum(1) / count.clamp(min=1)).sum()


class WordsAndContrast(Method):
    """Both terms, where a model gives `.logits` (B, C), `.states` (B, d), and rows say their `view`: 0 is plain.

    Without dropout: on a processor its random numbers cost nearly as much as the layers.
    """

    noise = False

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


@dataclass(frozen=True)
class Plan:
    """Steps that the budget has room for: of the adapter, and of its trials on parts of the examples; 0 for none."""

    steps: int
    trials: tuple[int, ...]

    @classmethod
    def of(cls, job: Job, scores: WordScores | None, trials: Sequence[int]) -> Plan:
        """The plan of an adapter for all examples, tried on as many rows as `trials` say; charged to the budget.

        Where all wanted steps cost more than what is left, each run has the same share of its own.
        """
        if len(job.examples) < _ROWS:
            return cls(0, ())
        templates, batch = _shape(job, scores)
        tokens = job.tokens(job.examples) / len(job.examples)
        each = job.work.step(batch * tokens, _blocks(job, scores))
        full = _wanted(job, len(job.examples), len(templates), batch)
        wanted = [full, *(max(_STEPS[0] // 2, full * rows // len(job.examples)) for rows in trials)]
        share = min(1.0, _SHARE * job.left / (each * sum(wanted)))
        if share * wanted[0] < _FEWEST:
            return cls(0, ())
        counts = [max(_FEWEST // 2, int(share * steps)) for steps in wanted]
        job.work.charge(each * sum(counts))
        return cls(counts[0], tuple(counts[1:]))


def _shape(job: Job, scores: WordScores | None) -> tuple[tuple[str | None, ...], int]:
    """Templates whose rows are learned from, None for the plain text; and how many rows a batch has."""
    many = len(job.labels) >= MANY
    templates = (None,) if many or scores is None else (None, *job.patterns)
    return templates, 64 if many else 24


def _wanted(job: Job, rows: int, templates: int, batch: int) -> int:
    """Steps that are worth their time."""
    epochs = _EPOCHS[len(job.labels) >= MANY]
    return min(max(epochs * rows * templates // batch, _STEPS[0]), _STEPS[1])


def _blocks(job: Job, scores: WordScores | None) -> int:
    """All blocks learn the contrast of plain texts; the label words are in the upper ones."""
    return _UPPER if scores is not None else len(job.work.sizes)


def adapt(job: Job, rows: Sequence[int], scores: WordScores | None, *, name: str, steps: int) -> TunedAdapter:
    """Train an adapter called `name` on some of the examples; it ends active and frozen.

    Without label words the contrast of plain texts is all that is learned; the labels' names are among the texts.
    """
    templates, batch = _shape(job, scores)
    examples = [job.examples[i] for i in rows]
    named = [Example(text, None, label) for text, label in zip(name_texts(job), job.labels, strict=False)]
    options: dict[str, Any] = {"max_length": job.max_length}
    sets = [view_dataset(t, examples, job.tokenizer, job.labels, **options) for t in templates]
    sets[0] = view_dataset(None, [*examples, *named], job.tokenizer, job.labels, **options)
    return tune(
        job.model,
        lambda reader: _WordsAndStates(reader, scores),
        joined(sets),
        job.config(steps, batch=batch),
        name=name,
        blocks=_blocks(job, scores),
        method_of=lambda _reader: WordsAndContrast(),
    )
