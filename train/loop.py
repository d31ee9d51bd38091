"""The training loop: one job from top to bottom, for any model, any adapter and any method.

A step takes `batch_size` rows of the epoch's order, however processes and micro-batches split them, and its loss is
a sum over items divided by the items of the whole step. So every split gives the same gradient:

    grad = 1/N sum_micro sum_{i in micro} grad loss_i,     N = items of the step over all processes
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import nn

from train.config import TrainConfig
from train.data.batches import Dataset
from train.errors import TrainError
from train.method import Method
from train.result import FitResult
from train.results.report import Metrics, progress_bar
from train.seeds import derive
from train.state import TrainingState
from train.steps.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from train.steps.evaluate import amp
from train.steps.guards import refuse_another_run, refuse_idle
from train.steps.processes import sum_gradients

__all__ = ["fit", "training"]

log = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    adapter: nn.Module,
    train_data: Dataset,
    eval_data: Dataset | None,
    config: TrainConfig,
    *,
    method: Method | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    save_every: int = 0,
    resume: bool = False,
    seconds: float | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train the adapter in place; it ends in its best state (without `eval_data`, in its last one).

    Parameters
    ----------
    model
        What computes `.logits`; the adapter is active in it. Its other parameters are not touched.
    adapter
        What trains: its parameters that require a gradient.
    out
        Folder for metrics.jsonl and the checkpoint; None writes nothing.
    progress
        A rich display to join; None shows a bar on a terminal and nothing in a pipe.
    save_every
        Steps between checkpoints, of which one more is written at the end (so that what follows can fail); 0 for
        none. Evaluations and patience do not depend on it.
    resume
        Go on from the checkpoint in `out`, bit for bit as if never interrupted.
    seconds
        Stop, evaluate and (with `out`) leave a checkpoint once training has taken this long, interruptions left out.
    watch
        Called with each record as it is made, in every process.

    Raises
    ------
    DataError
        An empty split, or rows whose labels are all masked.
    TrainError
        Nothing to train, a parameter that gets no gradient, a checkpoint of another run, a full disk.
    NonFiniteLoss
        The loss or gradient is NaN or infinite: the best state is back in place and the error says where.
    """
    if (save_every or resume) and out is None:
        raise TrainError("checkpoints need a folder", hint="give out=")
    method, accelerator = method or Method(), Accelerator()
    state = TrainingState(adapter, train_data, eval_data, config, method)
    result, checkpoint = state.result, (out or Path()) / CHECKPOINT
    if resume:
        _load(state, checkpoint)
    metrics = Metrics(out if accelerator.is_main_process else None, result.history, watch)
    with (
        training(model, adapter, config, noise=method.noise),
        metrics,
        progress_bar(progress, accelerator) as advance,
    ):
        advance(result.steps, result.total_steps, "")
        while state.going:
            record = _step(model, state, accelerator)
            if seconds is not None and result.seconds >= seconds and result.steps < result.total_steps:
                result.stopped = "time"
            if state.record_is_due:
                metrics.add(record)
            if state.evaluation_is_due:
                metrics.add(state.evaluate(model, accelerator))
            regular = save_every and (not state.going or result.steps % save_every == 0)
            if regular or (result.stopped == "time" and out):
                metrics.flush()
                _save(state, checkpoint, accelerator)
            advance(result.steps, result.total_steps, f"loss {record['loss']:.3f}")
    state.restore_best()
    return result


def _step(model: nn.Module, state: TrainingState, accelerator: Accelerator) -> dict[str, Any]:
    """One optimizer step over `batch_size` rows; returns its record."""
    started, step, config, data = time.perf_counter(), state.result.steps, state.config, state.train_data
    rows = state.next_rows()
    items = int(data.items[rows].sum())
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    # a stream for each step and process: nothing that happens elsewhere can shift the dropout masks
    torch.manual_seed(derive(config.seed, "dropout", step, accelerator.process_index))
    total = torch.zeros((), device=state.device)
    for micro in torch.split(mine, config.micro_batch or config.batch_size) if len(mine) else ():
        batch = {name: value.to(state.device) for name, value in data.batch(micro).items()}
        with amp(state.device, config.precision):
            loss = state.method.loss(model, batch, data.task) / items
        if loss.requires_grad:  # if not, nothing gets a gradient, and the first step says so by name
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if step == 0 and len(mine):
        refuse_idle(state.named)
    total = sum_gradients(state.parameters, total, accelerator)
    return state.step(total, rows, since=started)


def _save(state: TrainingState, path: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        write_checkpoint(path, {"run": state.identity(), **state.state_dict()})
    accelerator.wait_for_everyone()


def _load(state: TrainingState, path: Path) -> None:
    """Take a checkpoint's state; one of another configuration or of other data is refused."""
    saved = read_checkpoint(path)
    refuse_another_run(saved["run"], state.identity(), path)
    state.load_state_dict(saved)
    log.info("resumed at step %d of %d", state.result.steps, state.result.total_steps)


@contextmanager
def training(model: nn.Module, adapter: nn.Module, config: TrainConfig, *, noise: bool = True) -> Iterator[None]:
    """Training mode (with dropout, if `noise`) for the length of a run; modes and random state come back as before."""
    before = model.training, adapter.training
    if config.gradient_checkpointing:
        _recompute(model, "enable", {"use_reentrant": False})
    model.train(noise)
    adapter.train(noise)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        model.train(before[0])
        adapter.train(before[1])
        if config.gradient_checkpointing:
            _recompute(model, "disable")


def _recompute(model: nn.Module, verb: str, *options: dict[str, Any]) -> None:
    """Turn gradient checkpointing on or off; transformers has renamed it and warns about the old name."""
    for word in ("activation", "gradient"):
        method: Any = getattr(model, f"{word}_checkpointing_{verb}", None)
        if method is not None:
            method(*options)
            return
    name = type(model).__name__
    raise TrainError(f"{name} cannot checkpoint gradients", hint="gradient_checkpointing=false")
