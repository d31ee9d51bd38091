"""Which texts to label next: those that the classifier is unsure of, and that are unlike each other.

Greedily, with u_i the uncertainty of a text (entropy over its largest value), h_i its unit mean state on the bare base,

    next = argmax_i u_i min_{j chosen or learned from} (1 - h_i . h_j)

so neither twins nor texts like those that it has learned from are asked for (where the artifact holds these).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hub.errors import UsageError
from train.fewshot.classifier.classifier import FewShotClassifier
from train.fewshot.examples import Text
from train.fewshot.reading.views import View

__all__ = ["AskedText", "ask", "uncertainty"]


@dataclass(frozen=True)
class AskedText:
    """A text to label: its place in the pool from 0, how unsure the classifier is (0 to 1), and its scores (C,)."""

    row: int
    uncertainty: float
    scores: Tensor


def uncertainty(task: str, scores: Tensor) -> Tensor:
    """(N,) from 0 to 1: entropy over its largest value; of several labels the mean of theirs; of numbers 1."""
    if task == "regression":
        return torch.ones(len(scores))
    if task == "multi_label_classification":
        both = torch.stack([scores, 1 - scores], -1)
        return _entropy(both).mean(1) / math.log(2)
    return _entropy(scores) / math.log(scores.shape[1])


def _entropy(shares: Tensor) -> Tensor:
    """Along the last dimension, in nats."""
    p = shares.double()
    return -(p * p.clamp_min(1e-30).log()).sum(-1).float()


def ask(classifier: FewShotClassifier, texts: Sequence[Text], n: int = 20) -> list[AskedText]:
    """The n texts of a pool that are worth most to label, the first of them first.

    Raises
    ------
    UsageError
        Fewer than one text is asked for.
    DataError
        As `FewShotClassifier.scores`.
    """
    if n < 1:
        raise UsageError(f"{n} texts are asked for", hint="--n 20")
    examples = classifier.examples(texts)
    scores = classifier.scores(examples)
    unsure = uncertainty(classifier.task, scores)
    reading = classifier.reading
    reading.switch(False)
    states = reading.features([View()], (), [*examples, *classifier.rows]).states[0] if examples else torch.empty(0, 1)
    pool, known = states[: len(examples)], states[len(examples) :]
    far = (1 - pool @ known.T).amin(1) if len(known) else torch.ones(len(examples))
    chosen: list[AskedText] = []
    left = torch.ones(len(examples), dtype=torch.bool)
    while len(chosen) < min(n, len(examples)):
        worth = (unsure * far.clamp_min(0)).masked_fill(~left, -1)
        best = int(worth.argmax())
        left[best] = False
        chosen.append(AskedText(best, float(unsure[best]), scores[best]))
        far = torch.minimum(far, 1 - pool @ pool[best])
    return chosen
