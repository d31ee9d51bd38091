"""A run's folder: what is said goes into its log, and what fails leaves nothing half-made in it."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.logging import RichHandler

from hub.errors import HubError, UsageError
from train.config import TrainConfig
from train.errors import TrainError
from train.steps.checkpoint import CHECKPOINT

__all__ = ["learned", "run_folder"]

log = logging.getLogger(__name__)


@contextmanager
def run_folder(
    folder: Path, config: TrainConfig, accelerator: Accelerator, console: Console, *, resume: bool
) -> Iterator[None]:
    """The run's folder, with what is said during the run in its log and, on a terminal, on stderr."""
    main = accelerator.is_main_process
    if main and folder.exists() and any(folder.iterdir()) and not resume:
        onward = "go on with --resume, " if (folder / CHECKPOINT).exists() else ""
        hint = f"{onward}write elsewhere with --out, or remove {folder}"
        raise UsageError(f"{folder} holds an earlier run", path=folder, hint=hint)
    handlers: list[logging.Handler] = [logging.NullHandler()]  # of other processes: the main one says it
    logger, level = logging.getLogger("train"), logging.getLogger("train").level
    try:
        if main:
            handlers = [_shown(console), _log_of(folder, config)]
            logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
            yield
    except KeyboardInterrupt:
        if main and (folder / CHECKPOINT).exists():
            log.warning("interrupted; --resume goes on from %s", folder / CHECKPOINT)
        raise
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        if main and folder.is_dir():
            _forget_if_nothing_was_learned(folder)


def _log_of(folder: Path, config: TrainConfig) -> logging.Handler:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():  # a resumed run keeps what it was started with
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    written = logging.FileHandler(folder / "run.log", encoding="utf-8")
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return written


def _shown(console: Console) -> logging.Handler:
    """All that is said on a terminal, above the progress bar; in a pipe, warnings alone."""
    if console.is_terminal:
        return RichHandler(level=logging.INFO, console=console, show_time=False, show_path=False)
    handler = logging.StreamHandler(console.file)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    return handler


@contextmanager
def learned(folder: Path) -> Iterator[None]:
    """What fails after the training leaves no half of an adapter, and says that this alone is left to be done again."""
    adapter = folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)  # of an attempt that was killed
    again = "then run again with --resume: what was learned is kept" if (folder / CHECKPOINT).exists() else None
    try:
        yield
    except (HubError, OSError) as error:
        if not any((adapter / last).exists() for last in ("module.json", "expression.txt")):
            shutil.rmtree(adapter, ignore_errors=True)
        if isinstance(error, HubError):
            error.hint = "; ".join(part for part in (error.hint, again) if part) or None
            raise
        told = f"cannot write {error.filename or folder}: {error.strerror or error}"
        raise TrainError(told, path=folder, hint=f"make room; {again}" if again else "make room") from error


def _forget_if_nothing_was_learned(folder: Path) -> None:
    """Remove what a run that failed before its first step has written, so that it can be started again."""
    traces = {"config.yaml", "run.log", "metrics.jsonl"}
    metrics = folder / "metrics.jsonl"
    if {path.name for path in folder.iterdir()} <= traces and not (metrics.exists() and metrics.stat().st_size):
        for name in traces:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
