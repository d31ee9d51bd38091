"""The model's loss where an adapter with a vocabulary of its own is active: transformers counts the base's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.errors import KindError

_KEPT = "_loss_function"  # where transformers keeps the loss that somebody has given a model


@contextmanager
def loss_over_own_tokens(
    model: PreTrainedModel, own: tuple[str, int] | None, given: Mapping[str, Any]
) -> Iterator[None]:
    """During a call with labels, take the loss over the tokens of an adapter with ``own``: its name and their number.

    Raises
    ------
    KindError
        The model takes its loss in its forward, by the base's number of tokens.
    """
    if own is None or given.get("labels") is None:
        yield
        return
    before, function, called = vars(model).get(_KEPT), model.loss_function, False

    def loss(logits: Tensor, labels: Tensor, *_size: int, **options: Any) -> Tensor:
        nonlocal called
        called = True
        taken: Tensor = function(logits, labels, **{**options, "vocab_size": logits.shape[-1]})
        return taken

    vars(model)[_KEPT] = loss
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if called or isinstance(error, torch.OutOfMemoryError):
            raise
        raise KindError(
            f"adapter {own[0]!r} has a vocabulary of its own, of {own[1]} tokens, and {type(model).__name__} takes its "
            "loss over the base's",
            hint="call it without labels, and take the loss from its logits",
        ) from error
    finally:
        if before is None:
            vars(model).pop(_KEPT, None)
        else:
            vars(model)[_KEPT] = before
