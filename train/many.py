"""Many adapters at once: each with its own data, loss, learning rate and stopping, over one frozen base in one pass.

A step takes each job's next rows, as its own run would, lays all of them into common passes, and adds up

    sum_j 1/N_j sum_{i of j} loss_j(i)

Adapters share no parameter and a row runs through its own adapter alone, so the gradient of each is that of its own
run; clipping, rate, optimizer, evaluation and stopping are each job's own. One base, one forward and backward for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compose
from hub.errors import UsageError
from train.config import TrainConfig, span_in_steps
from train.data.batches import IGNORE, Dataset, epoch_order
from train.data.datasets import check
from train.errors import NonFiniteLoss, TrainError
from train.learner.heads import head_parameters
from train.method import Method
from train.result import FitResult
from train.seeds import derive
from train.steps.evaluate import amp, evaluate, rank
from train.steps.objective import forward, loss_sum
from train.steps.optimizer import learning_rate, make_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compose.kind.adapter import Adapter

__all__ = ["Job", "fit_many"]

Loss = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """One adapter's part of the training; of `config`, what concerns base, method and micro-batches is not read.

    `adapter` is resident on the model under its name. `loss` gives the sum over a batch's items from the task, the
    logits of the job's own rows, and their labels.
    """

    adapter: Adapter
    train: Dataset
    config: TrainConfig
    eval: Dataset | None = None
    loss: Loss = loss_sum


@dataclass
class _Run:
    """The state of one job."""

    job: Job
    result: FitResult
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    epoch_steps: int
    order: tuple[int, Tensor] = (-1, torch.empty(0))
    best_state: dict[str, Tensor] | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def going(self) -> bool:
        """Whether it has steps left and nothing has stopped it."""
        return self.result.stopped == "finished" and self.result.steps < self.result.total_steps

    def rows(self) -> Tensor:
        """The rows of its next step: those its own run would take."""
        config, data = self.job.config, self.job.train
        epoch, index = divmod(self.result.steps, self.epoch_steps)
        if self.order[0] != epoch:
            grouped = config.group_by_length
            self.order = epoch, epoch_order(data, config.seed, epoch, config.batch_size, group_by_length=grouped)
        return self.order[1][index * config.batch_size : (index + 1) * config.batch_size]


@dataclass(frozen=True)
class _Share:
    """Rows of one job in a pass."""

    run: _Run
    rows: Tensor
    items: int  # of the job's whole step
    last: bool = True  # of the job's rows in this step


def fit_many(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    *,
    rows: int | None = None,
    through: nn.Module | None = None,
    seconds: float | None = None,
) -> dict[str, FitResult]:
    """Train all jobs' adapters in place; each ends in its best state (without evaluation rows, in its last one).

    Parameters
    ----------
    model
        The base on which the adapters are resident; what was active is active again at the end.
    rows
        Rows in one pass at most, which bounds the memory: with those of one job the activations are those of one run,
        and gradients of one adapter exist at a time. Default: all rows of a step in one pass, which a CPU's caches may
        not hold: there, some 512 tokens of a base of width 1024 go through faster.
    through
        What computes `.logits`, with the model inside it; default: the model itself.
    seconds
        Stop all jobs once training has taken this long.

    Returns
    -------
    The result of each job by its adapter's name.

    Raises
    ------
    UsageError
        No job, two jobs for one adapter, or tasks that the base cannot serve together.
    NonFiniteLoss
        A job's loss or gradient broke; every job is back in its best state, and the error names the job.
    """
    _check(jobs)
    home = compose.runtime.model_runtime.runtime(model)
    before, training, config = home.rows, model.training, jobs[0].config
    runs = [_started(job) for job in jobs]
    (through or model).train()
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for turn in range(max(run.result.total_steps for run in runs)):
                live = [run for run in runs if run.going]
                if not live:
                    break
                torch.manual_seed(derive(config.seed, "dropout", turn))
                _step(model, through or model, live, rows, config.precision)
                if seconds is not None and time.perf_counter() - started >= seconds:
                    _out_of_time(runs)
    finally:
        for run in runs:
            if run.best_state is not None:
                run.job.adapter.load_state_dict(run.best_state)
        (through or model).train(training)
        compose.activate(model, list(before) if len(before) > 1 else before[0])
    return {run.job.adapter.name: run.result for run in runs}


def _check(jobs: Sequence[Job]) -> None:
    names = [job.adapter.name for job in jobs]
    if not names or len(set(names)) < len(names):
        raise UsageError("give one job or more, each with an adapter of its own")
    tasks = {job.train.task for job in jobs}
    if len(tasks) > 1:
        told = " and ".join(sorted(tasks))
        raise UsageError(f"one pass has one kind of output, not {told}", hint="train these apart")
    for job in jobs:
        for data in (job.train, job.eval):
            if data is not None:
                check(data)


def _started(job: Job) -> _Run:
    parameters = [p for p in job.adapter.parameters() if p.requires_grad]
    if not parameters:
        raise TrainError(f"adapter {job.adapter.name!r} has no parameter to train", hint="adapter.unfreeze()")
    epoch_steps = math.ceil(len(job.train) / job.config.batch_size)
    total = span_in_steps(job.config.duration, epoch_steps)
    groups = Method().groups(job.adapter, job.config)
    optimizer = make_optimizer(job.config, groups, heads=head_parameters(job.adapter))
    return _Run(job, FitResult(total_steps=total), optimizer, parameters, epoch_steps)


def _out_of_time(runs: Sequence[_Run]) -> None:
    for run in runs:
        if run.going:
            run.result.stopped = "time"


def _step(model: PreTrainedModel, net: nn.Module, runs: Sequence[_Run], limit: int | None, precision: str) -> None:
    """One optimizer step of every job."""
    shares = []
    for run in runs:
        rows = run.rows()
        run.total = torch.zeros((), device=run.parameters[0].device)
        shares.append(_Share(run, rows, int(run.job.train.items[rows].sum())))
    started = time.perf_counter()
    for part in _passes(shares, limit):
        _pass(model, net, part, precision)
        done, now = [share for share in part if share.last], time.perf_counter()
        for share in done:
            _update(share.run, share.items, (now - started) / len(done))
        started = now if done else started
    for run in runs:
        every = span_in_steps(run.job.config.eval_every, run.epoch_steps) or run.result.total_steps
        due = run.result.steps == run.result.total_steps or run.result.steps % every == 0
        if run.job.eval is not None and due:
            _evaluate(model, net, run, run.job.eval)


def _passes(shares: Sequence[_Share], limit: int | None) -> list[list[_Share]]:
    """All rows of a step in parts of at most `limit` rows, the longest of a job first.

    A job's rows follow each other, so that it can step and let go of its gradients before the next ones have theirs.
    """
    parts: list[list[_Share]] = []
    room = 0
    for share in shares:
        order = torch.argsort(share.run.job.train.lengths[share.rows], descending=True, stable=True)
        pieces = torch.split(share.rows[order], limit or len(order))
        for i, rows in enumerate(pieces):
            if not parts or (limit is not None and len(rows) > room):
                parts.append([])
                room = limit or 0
            parts[-1].append(_Share(share.run, rows, share.items, last=i == len(pieces) - 1))
            room -= len(rows)
    return parts


def _pass(model: PreTrainedModel, net: nn.Module, shares: Sequence[_Share], precision: str) -> None:
    """Forward and backward of rows of several jobs; gradients add up in their adapters."""
    device = shares[0].run.total.device
    batches = [{n: v.to(device) for n, v in share.run.job.train.batch(share.rows).items()} for share in shares]
    compose.activate(model, [share.run.job.adapter.name for share in shares for _ in range(len(share.rows))])
    task = shares[0].run.job.train.task
    with amp(device, precision):
        logits = forward(net, _together(batches, shares[0].run.job.train.pad_id), task)
        parts = torch.split(logits, [len(share.rows) for share in shares])
        loss = torch.zeros((), device=device)
        for share, batch, own in zip(shares, batches, parts, strict=True):
            out = _own(own, batch["labels"], share.run.job.train)
            term = share.run.job.loss(task, out, batch["labels"]) / share.items
            if not bool(term.isfinite()):  # its gradient would be NaN in the rows of all others too
                _break(share.run, f"loss is {float(term.detach())} on {share.run.job.train.where(share.rows)}")
            share.run.total += term.detach()
            loss = loss + term
    loss.backward()  # type: ignore[no-untyped-call]


def _together(batches: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Batches of several jobs as one, padded to the longest."""
    fills = {"input_ids": pad_id, "labels": IGNORE}
    found = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if values[0].dim() == 2:
            longest = max(value.shape[1] for value in values)
            values = [F.pad(v, (0, longest - v.shape[1]), value=fills.get(name, 0)) for v in values]
        found[name] = torch.cat(values)
    return found


def _own(logits: Tensor, labels: Tensor, data: Dataset) -> Tensor:
    """A job's logits without the padding and the classes of others."""
    out = logits[:, : labels.shape[1]] if labels.dim() == 2 else logits
    return out[..., : len(data.labels)] if data.labels else out


def _break(run: _Run, what: str) -> NoReturn:
    run.result.stopped = "non-finite"
    raise NonFiniteLoss(
        f"adapter {run.job.adapter.name!r}, step {run.result.steps + 1}: {what}",
        result=run.result,
        hint="look at these rows, or lower its lr; the other adapters are in their best states",
    )


def _update(run: _Run, items: int, seconds: float) -> None:
    """Clip, step and record, as the job's own run would."""
    config, result = run.job.config, run.result
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.clip or math.inf)
    loss, size = float(run.total), float(norm)
    if not math.isfinite(size):
        _break(run, f"gradient norm is {size}")
    rate = learning_rate(config, result.steps, result.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    result.steps, result.items, result.seconds = result.steps + 1, result.items + items, result.seconds + seconds
    values: dict[str, Any] = {"step": result.steps, "loss": loss, "lr": rate, "grad_norm": size, "items": items}
    result.history.append(values)


def _evaluate(model: PreTrainedModel, net: nn.Module, run: _Run, data: Dataset) -> None:
    """Measure the job by itself, keep its best state, count its patience."""
    config, result, metric = run.job.config, run.result, run.job.config.best_metric
    compose.activate(model, run.job.adapter.name)
    measured = evaluate(net, data, batch_size=2 * config.batch_size, precision=config.precision)
    finite = math.isfinite(measured["loss"])
    better = finite and (result.best is None or rank(measured, metric) < rank(result.best, metric))
    if better:
        result.best, result.waited = {"step": result.steps, **measured}, 0
        run.best_state = {name: value.detach().clone() for name, value in run.job.adapter.state_dict().items()}
    else:
        result.waited += 1
    result.history.append({"step": result.steps, "eval": measured, "best": better})
    if config.patience and result.waited >= config.patience and run.going:
        result.stopped = "patience"
