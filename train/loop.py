"""The training loop: one job from top to bottom, for any model, any adapter and any method.

A step takes `batch_size` rows of the epoch's order, however processes and micro-batches split them, and its loss is
a sum over items divided by the items of the whole step. So every split gives the same gradient:

    grad = 1/N sum_micro sum_{i in micro} grad loss_i,     N = items of the step over all processes
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import Tensor, nn

from train.config import TrainConfig, span_in_steps
from train.data.batches import Dataset, epoch_order
from train.data.datasets import check
from train.errors import NonFiniteLoss, TrainError
from train.learner.heads import head_parameters
from train.method import Method
from train.result import FitResult
from train.results.report import Metrics, progress_bar
from train.seeds import derive
from train.steps.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from train.steps.evaluate import amp, evaluate, rank
from train.steps.guards import explain_non_finite, is_finite, refuse_another_run, refuse_idle
from train.steps.optimizer import learning_rate, make_optimizer
from train.steps.processes import sum_gradients

__all__ = ["fit", "training"]

log = logging.getLogger(__name__)
_LOGGED = 2000  # steps a history keeps at most: longer runs log every k-th one


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
    for data in (train_data, eval_data):
        if data is not None:
            check(data)
    if (save_every or resume) and out is None:
        raise TrainError("checkpoints need a folder", hint="give out=")
    loop = _Loop(model, adapter, train_data, eval_data, config, method=method or Method())
    result, checkpoint = loop.result, (out or Path()) / CHECKPOINT
    if resume:
        loop.load(checkpoint)
    metrics = Metrics(out if loop.accelerator.is_main_process else None, result.history, watch)
    with training(model, adapter, config), metrics, progress_bar(progress, loop.accelerator) as advance:
        advance(result.steps, result.total_steps, "")
        while result.steps < result.total_steps and result.stopped == "finished":
            record = loop.step()
            if seconds is not None and result.seconds >= seconds and result.steps < result.total_steps:
                result.stopped = "time"
            if result.steps % loop.log_every == 0 or result.steps == result.total_steps:
                metrics.add(record)
            if eval_data is not None and loop.evaluation_is_due():
                metrics.add(loop.evaluate(eval_data))
            ended = result.steps == result.total_steps or result.stopped != "finished"
            if (save_every and (ended or result.steps % save_every == 0)) or (result.stopped == "time" and out):
                metrics.flush()
                loop.save(checkpoint)
            advance(result.steps, result.total_steps, f"loss {record['loss']:.3f}")
    loop.restore_best()
    return result


class _Loop:
    """The state of one run, and what can be done to it."""

    def __init__(
        self,
        model: nn.Module,
        adapter: nn.Module,
        train_data: Dataset,
        eval_data: Dataset | None,
        config: TrainConfig,
        *,
        method: Method,
    ) -> None:
        self.model, self.adapter, self.method, self.config = model, adapter, method, config
        self.train_data, self.eval_data = train_data, eval_data
        self.named = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        if not self.named:
            raise TrainError("the adapter has no parameter that requires a gradient", hint="adapter.unfreeze()")
        self.parameters = list(self.named.values())
        self.device = self.parameters[0].device
        self.accelerator = Accelerator()
        self.optimizer = make_optimizer(config, method.groups(adapter, config), heads=head_parameters(adapter))
        self.epoch_steps = math.ceil(len(train_data) / config.batch_size)
        self.result = FitResult(total_steps=span_in_steps(config.duration, self.epoch_steps))
        self.eval_every = span_in_steps(config.eval_every, self.epoch_steps) or self.result.total_steps
        self.log_every = math.ceil(self.result.total_steps / _LOGGED)
        self.best_state: dict[str, Tensor] | None = None
        method.start(adapter, self.optimizer, self.result.total_steps)
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))  # epoch, its rows

    def step(self) -> dict[str, Any]:
        """One optimizer step over `batch_size` rows; returns its record."""
        started, step, result = time.perf_counter(), self.result.steps, self.result
        rows = self._rows(step)
        items = int(self.train_data.items[rows].sum())
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        # a stream for each step and process: nothing that happens elsewhere can shift the dropout masks
        torch.manual_seed(derive(self.config.seed, "dropout", step, self.accelerator.process_index))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for micro in torch.split(mine, self.config.micro_batch or self.config.batch_size) if len(mine) else ():
            loss += self._backward(micro, items)
        if step == 0 and len(mine):
            refuse_idle(self.named)
        loss = sum_gradients(self.parameters, loss, self.accelerator)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only synchronization
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._stop(explain_non_finite(loss_value, norm_value, self.train_data.where(rows), self.named))
        rate = learning_rate(self.config, step, result.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.step()
        self.method.after_step(self.adapter, step)
        result.steps, result.items = step + 1, result.items + items
        result.seconds += time.perf_counter() - started
        epoch = round(result.steps / self.epoch_steps, 4)
        values = {"step": result.steps, "epoch": epoch, "loss": loss_value, "lr": rate, "grad_norm": norm_value}
        return {**values, "items": items, "seconds": round(result.seconds, 3)}

    def evaluation_is_due(self) -> bool:
        """Every `eval_every` steps, and after the last one."""
        ended = self.result.steps == self.result.total_steps or self.result.stopped == "time"
        return ended or self.result.steps % self.eval_every == 0

    def evaluate(self, data: Dataset) -> dict[str, Any]:
        """Measure, remember the state if it is the best one, count patience; returns the record."""
        result, started = self.result, time.perf_counter()
        size = 2 * (self.config.micro_batch or self.config.batch_size)  # there are no gradients to hold
        precision, accelerator = self.config.precision, self.accelerator
        options: dict[str, Any] = {"precision": precision, "accelerator": accelerator, "logits": self.method.logits}
        measured = evaluate(self.model, data, batch_size=size, **options)
        result.seconds += time.perf_counter() - started
        counts = math.isfinite(measured["loss"]) and self.method.keeps(result.steps)
        metric = self.config.best_metric
        better = counts and (result.best is None or rank(measured, metric) < rank(result.best, metric))
        if better:
            result.best, result.waited = {"step": result.steps, **measured}, 0
            self.best_state = {name: value.detach().clone() for name, value in self.adapter.state_dict().items()}
        elif self.method.keeps(result.steps):
            result.waited += 1
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        log.info("step %d: held-out %s%s", result.steps, shown, " (best)" if better else "")
        if self.config.patience and result.waited >= self.config.patience and result.steps < result.total_steps:
            result.stopped = "patience"
            log.info("step %d: stopped, %d evaluations without a better one", result.steps, result.waited)
        return {"step": result.steps, "eval": measured, "best": better}

    def restore_best(self) -> None:
        """Put the best state back into the adapter."""
        if self.best_state is not None:
            self.adapter.load_state_dict(self.best_state)

    def save(self, path: Path) -> None:
        """Write everything the rest of the run depends on; random streams need no saving (see train.seeds)."""
        if self.accelerator.is_main_process:
            tensors = {"adapter": self.adapter.state_dict(), "best_state": self.best_state}
            state = {"optimizer": self.optimizer.state_dict(), "result": dict(vars(self.result))}
            write_checkpoint(path, {"run": self._identity(), **tensors, **state})
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Take a checkpoint's state; one of another configuration or of other data is refused."""
        state = read_checkpoint(path)
        refuse_another_run(state["run"], self._identity(), path)
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_state = state["best_state"]
        for name, value in state["result"].items():
            setattr(self.result, name, value)
        if self.result.stopped == "time":  # there is more of it now
            self.result.stopped = "finished"
        log.info("resumed at step %d of %d", self.result.steps, self.result.total_steps)

    def _rows(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.epoch_steps)
        size, grouped = self.config.batch_size, self.config.group_by_length
        if self.order[0] != epoch:
            order = epoch_order(self.train_data, self.config.seed, epoch, size, group_by_length=grouped)
            self.order = epoch, order
        return self.order[1][index * size : (index + 1) * size]

    def _backward(self, rows: Tensor, items: int) -> Tensor:
        batch = {name: value.to(self.device) for name, value in self.train_data.batch(rows).items()}
        with amp(self.device, self.config.precision):
            loss = self.method.loss(self.model, batch, self.train_data.task) / items
        if loss.requires_grad:  # if not, nothing gets a gradient, and the first step says so by name
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _stop(self, broken: str) -> None:
        """The parameters are still those before the bad step; go back to the best and say where it broke."""
        result = self.result
        self.restore_best()
        result.stopped = "non-finite"
        kept = f"the best state, of step {result.best['step']}" if result.best else "the state before it"
        if not is_finite(self.adapter):  # the step before overflowed, and nothing was evaluated since
            kept = "nothing: no state was evaluated and the last one is not finite"
        raise NonFiniteLoss(
            f"step {result.steps + 1} (epoch {result.steps // self.epoch_steps + 1}): {broken}; kept {kept}",
            result=result,
            hint="look at these rows; or lower lr, raise warmup, lower clip",
        )

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the interrupted one; how rows are split may change."""
        run = self.config.model_dump(mode="json", exclude={"micro_batch", "gradient_checkpointing", "data"})
        held_out = self.eval_data.digest if self.eval_data is not None else None
        return {**run, "training data": self.train_data.digest, "held-out data": held_out}


@contextmanager
def training(model: nn.Module, adapter: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Training mode for the length of the run; the caller's modes and random state come back as they were."""
    before = model.training, adapter.training
    if config.gradient_checkpointing:
        _recompute(model, "enable", {"use_reentrant": False})
    model.train()
    adapter.train()
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
