"""Refusals of the loop: training that would silently do nothing, or that has broken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from train.errors import TrainError

__all__ = ["explain_non_finite", "is_finite", "refuse_another_run", "refuse_idle"]


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
