"""What each task minimizes: sums over items, so that any split of a batch adds up to the same loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from train.batches import IGNORE
from train.errors import TrainError

__all__ = ["LOSSES", "loss_sum"]


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum_t log p(x_t | x_<t) over the learned tokens; logits (B, T, V), labels (B, T); nats."""
    # the labels move, not the logits: a shifted view of the logits would be copied whole
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="sum")


def row_label(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum_b log p(y_b | x_b); logits (B, C), labels (B,); nats."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"causal_lm": next_token, "classification": row_label}


def loss_sum(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the items of a batch of the task's loss, in float32.

    Raises
    ------
    TrainError
        The model's logits have another shape than the task's labels call for.
    """
    if logits.shape[: labels.dim()] != labels.shape or logits.dim() != labels.dim() + 1:
        raise TrainError(
            f"task {task}: labels have shape {tuple(labels.shape)}, the model's logits {tuple(logits.shape)}",
            hint="load the base for this task: compose.load(base, task=...)",
        )
    loss: Tensor = torch.as_tensor(LOSSES[task](logits, labels))
    return loss
