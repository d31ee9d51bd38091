"""Held-out measures: loss and perplexity of a language model; accuracy, F1 and calibration of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from train.data.batches import IGNORE, Dataset
from train.data.datasets import check
from train.steps.objective import forward, loss_sum

__all__ = ["calibration_error", "evaluate", "f1_macro", "measures", "perplexity", "rank"]


def rank(measured: Mapping[str, float], metric: str) -> tuple[float, float]:
    """A sort key that is smaller for what is better: by the metric, then by the loss."""
    rising = metric in ("accuracy", "f1", "pearson", "spearman")
    return -measured[metric] if rising else measured[metric], measured["loss"]


def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    batch_size: int = 32,
    precision: str = "fp32",
    accelerator: Accelerator | None = None,
    logits: Callable[[nn.Module, dict[str, Tensor], str], Tensor] = forward,
) -> dict[str, float]:
    """Measures of a model on held-out rows, in evaluation mode and without gradients.

    Language modelling and sequence to sequence: `loss` (nats per predicted token), `perplexity = exp(loss)`,
    `tokens`. Classification, of rows or of tokens: `loss` (nats per item), `accuracy`, `f1` (macro), `ece` (15 bins),
    `rows`. Regression: `loss` (mean squared error), `pearson`, `spearman`, `rows`. With an accelerator of several
    processes each takes a share of the batches, and all return the same values. `logits` computes the model's outputs
    for a batch, where a method does so in its own way.

    Raises
    ------
    DataError
        An empty split, or rows whose labels are all masked.
    """
    check(data)
    device = next(model.parameters()).device
    part, parts = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    total = 0.0
    outputs_and_labels: list[tuple[Tensor, Tensor]] = []
    with _evaluation_mode(model), torch.no_grad(), amp(device, precision):
        for _, batch in data.batches(batch_size, part=part, parts=parts):
            here = {name: value.to(device) for name, value in batch.items()}
            labels, out = here["labels"], logits(model, here, data.task)
            total += float(loss_sum(data.task, out, labels))
            if data.task not in _OF_TEXT:
                learned = labels != IGNORE if data.task != "regression" else torch.ones_like(labels, dtype=torch.bool)
                outputs_and_labels.append((out.float()[learned].cpu(), labels[learned].cpu()))
    if accelerator and parts > 1:
        total = float(accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=device)))
        outputs_and_labels = gather_object(outputs_and_labels)
    loss = total / int(data.items.sum())
    if data.task in _OF_TEXT:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(data.items.sum())}
    outputs, labels = (torch.cat(parts_) for parts_ in zip(*outputs_and_labels, strict=True))
    return {"loss": loss, **measures(data.task, outputs, labels), "rows": float(len(labels))}


def measures(task: str, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Measures of a task from outputs (N, C) and labels; see `evaluate`.

    Of several labels a text: `exact`, the share of rows whose set of labels (outputs above 0) is right, and `f1_micro`,
    over all rows and labels; their labels are (N, C) of 0 and 1.
    """
    return _MEASURES[task](outputs, labels)


def _of_classes(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Of logits (N, C) and classes (N,)."""
    probabilities = outputs.softmax(-1)
    guess = probabilities.argmax(-1)
    accuracy = float((guess == labels).double().mean())
    return {"accuracy": accuracy, "f1": f1_macro(guess, labels), "ece": calibration_error(probabilities, labels)}


def _of_numbers(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Of predictions (N, 1) and numbers (N,)."""
    guess, truth = outputs[:, 0].double(), labels.double()
    mae = float((guess - truth).abs().mean())
    return {"pearson": _correlation(guess, truth), "spearman": _correlation(_ranks(guess), _ranks(truth)), "mae": mae}


def _of_label_sets(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Of outputs (N, C), a label where they are above 0, and (N, C) of 0 and 1."""
    guess, truth = outputs > 0, labels.bool()
    said = int(guess.sum()) + int(truth.sum())
    hits = int((guess & truth).sum())
    return {"exact": float((guess == truth).all(1).double().mean()), "f1_micro": 2 * hits / said if said else 1.0}


_OF_TEXT = ("causal_lm", "seq2seq")
_MEASURES = {
    "classification": _of_classes,
    "token_classification": _of_classes,
    "multi_label_classification": _of_label_sets,
    "regression": _of_numbers,
}


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's r; 0 where one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """(N,) the rank of each value, equal values sharing their mean rank."""
    _, group, count = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    middle = count.cumsum() - (count - 1) / 2
    return torch.from_numpy(middle[group])


def perplexity(model: nn.Module, data: Dataset, *, batch_size: int = 32, precision: str = "fp32") -> float:
    """Perplexity: exp of the mean negative log likelihood per predicted token."""
    return evaluate(model, data, batch_size=batch_size, precision=precision)["perplexity"]


def f1_macro(guess: Tensor, labels: Tensor) -> float:
    """Mean over the classes present in guess or labels of `2 TP / (2 TP + FP + FN)`; (N,) and (N,)."""
    scores = []
    for label in torch.unique(torch.cat([guess, labels])):
        hit = int(((guess == label) & (labels == label)).sum())
        scores.append(2 * hit / (int((guess == label).sum()) + int((labels == label).sum())))
    return sum(scores) / len(scores)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (arXiv 1706.04599): `sum_b |B_b| / N |accuracy(B_b) - confidence(B_b)|`.

    (N, C) probabilities, (N,) labels; bins of equal width over the largest probability.
    """
    confidence, guess = probabilities.double().max(-1)
    right = (guess == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, which, right - confidence)
    return float(gap.abs().sum() / len(labels))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def amp(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
