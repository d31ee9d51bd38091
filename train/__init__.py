"""New adapters: data, one training loop, evaluation, and publishing what was learned as an artifact."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["FitResult", "TrainConfig", "fit", "perplexity", "read_rows", "text_blocks"]

_HOMES = {
    "FitResult": "train.result",
    "TrainConfig": "train.config",
    "fit": "train.loop",
    "perplexity": "train.steps.evaluate",
    "read_rows": "train.data.datasets",
    "text_blocks": "train.data.datasets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
