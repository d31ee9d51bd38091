"""What each task minimizes: sums over items, so that any split of a batch adds up to the same loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compose.base.text_config import fact
from train.data.batches import IGNORE
from train.errors import TrainError

__all__ = ["LOSSES", "forward", "item_count", "learned", "loss_sum"]


def forward(model: nn.Module, batch: Mapping[str, Tensor], task: str) -> Tensor:
    """The model's logits for a batch; only an encoder-decoder's decoder sees (earlier) labels."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = _shifted(batch["labels"], model.config)
    if fact(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # training has no use for keys and values
    logits: Tensor = model(**inputs).logits
    return logits


def _shifted(labels: Tensor, config: Any) -> Tensor:
    """What the decoder reads when it is to say `labels` (B, T): the start token, then all but the last."""
    start, pad = fact(config, "decoder_start_token_id"), fact(config, "pad_token_id") or 0
    return F.pad(labels[:, :-1], (1, 0), value=start).masked_fill(F.pad(labels[:, :-1], (1, 0)) == IGNORE, pad)


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """`-sum_t log p(x_t | x_<t)` over the learned tokens; logits (B, T, V), labels (B, T); nats."""
    # the labels move, not the logits: a shifted view of the logits would be copied whole
    return each_token(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORE))


def each_token(logits: Tensor, labels: Tensor) -> Tensor:
    """`-sum_t log p(y_t)`; logits (B, T, C), labels (B, T); nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def row_label(logits: Tensor, labels: Tensor) -> Tensor:
    """`-sum_b log p(y_b | x_b)`; logits (B, C), labels (B,); nats."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """`sum_b (f(x_b) - y_b)^2`; logits (B, 1), labels (B,)."""
    return (logits[:, 0].float() - labels.float()).square().sum()


def learned(task: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The (N, C) logits and (N,) labels of a batch's items, where a task has classes."""
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE) if task == "causal_lm" else labels
    where = target != IGNORE
    return logits[where], target[where]


def item_count(task: str, labels: Tensor) -> int:
    """Terms that a batch adds to the loss: those of `Dataset.items`."""
    if task == "regression":
        return len(labels)
    return int(((labels[:, 1:] if task == "causal_lm" else labels) != IGNORE).sum())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal_lm": next_token,
    "seq2seq": each_token,
    "classification": row_label,
    "token_classification": each_token,
    "regression": squared_error,
}


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
