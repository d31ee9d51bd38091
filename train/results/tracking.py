"""Trackers by accelerate: TensorBoard, wandb, mlflow, ... follow a run's records beside its own metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from hub.errors import UsageError
from train.config import TrainConfig

__all__ = ["tracking"]

Watch = Callable[[dict[str, Any]], None]


@contextmanager
def tracking(
    trackers: Sequence[str | GeneralTracker], config: TrainConfig, folder: Path, *, name: str
) -> Iterator[Watch | None]:
    """Yield what to call with each record, or None where nothing is tracked; the trackers are ended at the end.

    Raises
    ------
    UsageError
        A tracker that accelerate does not know or whose library is missing: it would be left out silently.
    """
    if not trackers:
        yield None
        return
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for tracker in trackers:
        if isinstance(tracker, str) and tracker not in available:
            told = ", ".join(available) or "none"
            raise UsageError(f"tracker {tracker!r} is not installed; there is {told}", hint=f"pip install {tracker}")
    accelerator = Accelerator(log_with=list(trackers), project_dir=folder)
    accelerator.init_trackers(name, config={"run": config.digest, **_flat(config.model_dump(mode="json"))})
    try:
        yield lambda record: accelerator.log(_scalars(record), step=record["step"])
    finally:
        accelerator.end_training()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """`train/loss`, `eval/accuracy`, ... of a record."""
    if "eval" in record:
        return {f"eval/{key}": value for key, value in record["eval"].items()}
    return {f"train/{key}": value for key, value in record.items() if key != "step"}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested values under dotted names; what trackers cannot hold as text."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat
