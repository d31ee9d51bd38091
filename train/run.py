"""One run from its configuration to a published artifact, and the folder it leaves.

    config.yaml          what was run
    metrics.jsonl        a line for each step and evaluation
    curves.svg           the same, to look at
    run.log              what was said
    checkpoint.safetensors   while it runs, with `save_every`
    adapter/             the artifact: weights, config, README.md (the card), module.json
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress

import compose
from hub.errors import UsageError
from hub.ref import AdapterRef
from hub.store import Artifact, Store
from train.config import TrainConfig, did_you_mean
from train.data import Splits, load_splits
from train.errors import DataError, NonFiniteLoss
from train.heads import modules_to_save
from train.loop import CHECKPOINT, FitResult, fit
from train.publish import next_version, publish, write_artifact
from train.report import plot_curves
from train.seeds import derive

if TYPE_CHECKING:
    from compose.kind import Adapter
    from transformers import PreTrainedModel

__all__ = ["Outcome", "Prepared", "prepare", "run"]

log = logging.getLogger(__name__)
NAME = "trained"  # the adapter's name inside the model while it trains


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first step."""

    model: PreTrainedModel
    adapter: Adapter
    tokenizer: Any
    splits: Splits


@dataclass(frozen=True)
class Outcome:
    """What a run left: the loop's result, the run's folder and, when published, the artifact."""

    result: FitResult
    folder: Path
    artifact: Artifact | None

    def as_dict(self) -> dict[str, Any]:
        """Values for scripts."""
        r = self.result
        facts = {"steps": r.steps, "items": r.items, "seconds": round(r.seconds, 3), "stopped": r.stopped}
        losses = [record["loss"] for record in r.history if "loss" in record]
        found = {"best": r.best, "last_loss": losses[-1] if losses else None, "folder": str(self.folder)}
        named = {"ref": str(self.artifact.ref), "digest": self.artifact.digest} if self.artifact else {}
        return {**named, **found, **facts}


def run(
    config: TrainConfig,
    *,
    folder: Path,
    ref: str | AdapterRef,
    store: Store | None = None,
    publishing: bool = True,
    resume: bool = False,
    save_every: int = 0,
    license: str | None = None,  # noqa: A002
    console: Console | None = None,
) -> Outcome:
    """Train what the configuration says, leave a folder, and publish the best adapter.

    Raises
    ------
    UsageError
        The folder holds another run (and `resume` is not set).
    NonFiniteLoss
        The best adapter so far lies in `folder/adapter`, unpublished.
    HubError
        Bad data, an unknown method or option, a base that cannot be loaded.
    """
    accelerator = Accelerator()
    store, ref = store or Store(), AdapterRef.parse(ref)
    if ref.version is None:
        ref = ref.at(version=next_version(store, ref.id))
    with _folder(folder, config, resume=resume, console=console or Console(stderr=True), main=accelerator.is_main_process):
        ready = prepare(config)
        progress = None if console is None else Progress(console=console)
        try:
            result = fit(
                ready.model,
                ready.adapter,
                ready.splits.train,
                ready.splits.eval,
                config,
                out=folder,
                save_every=save_every,
                resume=resume,
            )
        except NonFiniteLoss as error:
            if accelerator.is_main_process:
                _leave(folder, ready, config, error.result, ref, license)
            error.hint = f"{error.hint}; the adapter kept is in {folder / 'adapter'}"
            raise
        if not accelerator.is_main_process:
            return Outcome(result, folder, None)
        _leave(folder, ready, config, result, ref, license)
        artifact = publish(folder / "adapter", store) if publishing else None
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return Outcome(result, folder, artifact)
