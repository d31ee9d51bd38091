"""Refusals: training that would silently do nothing, that does not fit its base, or that has broken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compose.base.compatibility import BaseWarning
from compose.base.text_config import fact
from compose.errors import KindError
from compose.runtime.model_runtime import runtime
from train.data.batches import Dataset, Ragged
from train.errors import ConfigError, DataError, TrainError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compose.kind.adapter import Adapter

__all__ = [
    "explain_non_finite",
    "heads_come_later",
    "is_finite",
    "options_of_the_run",
    "refuse_another_run",
    "refuse_idle",
    "refuse_looking_ahead",
    "refuse_misfit",
]


@contextmanager
def heads_come_later(expected: bool) -> Iterator[None]:
    """No word about a head that the base's files lack, where a task trains one or an adapter brings it."""
    with warnings.catch_warnings():
        if expected:
            warnings.filterwarnings("ignore", message=".*: drawn with seed 0", category=BaseWarning)
        yield


@contextmanager
def options_of_the_run() -> Iterator[None]:
    """What a kind refuses of its options was written in the run: a ConfigError."""
    try:
        yield
    except KindError as error:
        raise ConfigError(error.message, hint=error.hint) from error


def refuse_misfit(
    model: PreTrainedModel, tokenizer: Any, data: Dataset, adapters: Iterable[Adapter], *, hint: str
) -> None:
    """Raise DataError where rows are longer than the base reads (`hint` takes the number), or hold foreign tokens.

    Virtual tokens of the adapters take places of their own where the base has a table of positions.
    """
    virtual = max((_places(adapter) for adapter in adapters), default=0) if runtime(model).sites.positions else 0
    longest = max(int(c.lengths.max()) for c in data.columns.values() if isinstance(c, Ragged))
    highest = int(data.tokens.values.max())
    limits = (fact(model.config, "max_position_embeddings"), tokenizer.model_max_length)
    positions = min((limit for limit in limits if limit), default=longest)
    if longest + virtual > positions:
        more = f" and the adapter {virtual} more" if virtual else ""
        told = f"{data.source} has rows of {longest} tokens{more}; this base reads {positions}"
        raise DataError(told, hint=hint.format(positions - virtual) if positions > virtual + 1 else "a smaller prompt")
    words = model.get_input_embeddings().weight.shape[0]
    if highest >= words:
        raise DataError(
            f"{data.source} holds token {highest}; this base knows {words} tokens",
            hint="the tokenizer belongs to another model",
        )


def _places(adapter: Adapter) -> int:
    options = adapter.config
    return getattr(options, "num_virtual_tokens", 0) if getattr(options, "move_positions", True) else 0


def refuse_looking_ahead(model: PreTrainedModel) -> None:
    """Raise TrainError for language modelling on a base whose tokens see those after them: it would just copy."""
    if not runtime(model).sites.reads_causally:
        raise TrainError(
            f"a token of {type(model).__name__} sees those after it: there is nothing to predict",
            hint="task=causal_lm needs a decoder; an encoder can do classification, token_classification, regression",
        )


def refuse_idle(named: Mapping[str, nn.Parameter]) -> None:
    """Raise TrainError when a parameter has no gradient after a backward pass: it would never be trained."""
    idle = [name for name, parameter in named.items() if parameter.grad is None]
    if idle:
        shown = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
        raise TrainError(
            f"{len(idle)} of {len(named)} parameters get no gradient: {shown}",
            hint="activate the adapter in the model (compose.activate), or leave these parameters out",
        )


def refuse_another_run(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise TrainError when a checkpoint was written under other values, naming them."""
    differs = [f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in now.items() if saved.get(key) != value]
    if differs:
        raise TrainError(
            f"{path} belongs to another run: {'; '.join(differs)}",
            path=path,
            hint="restore these values, or start again without --resume",
        )


def explain_non_finite(loss: float, norm: float, where: str, named: Mapping[str, nn.Parameter]) -> str:
    """Say what broke and where: the rows of the step, and the first parameter whose gradient broke."""
    what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
    bad = [name for name, p in named.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return f"{what} on {where}{f' (gradient of {bad[0]})' if bad else ''}"


def is_finite(module: nn.Module) -> bool:
    """Whether no parameter holds a NaN or an infinity."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())
