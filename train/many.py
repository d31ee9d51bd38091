"""Many adapters at once: each with its own data, loss, learning rate and stopping, over one frozen base in one pass.

A step takes each job's next rows, as its own run would, lays all of them into common passes, and adds up

    sum_j 1/N_j sum_{i of j} loss_j(i)

Adapters share no parameter and a row runs through its own adapter alone, so the gradient of each is that of its own
run; method, clipping, rate, optimizer, evaluation and stopping are each job's own. One base, one forward and backward
for all, or two: methods that read the base without its dropout go apart from those that train with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compose
from compose.kind.adapter import Adapter
from hub.errors import UsageError
from train.config import TrainConfig
from train.data.batches import IGNORE, Dataset
from train.method import Composite, Method, why_alone
from train.result import FitResult
from train.seeds import derive
from train.state import TrainingState
from train.steps.evaluate import amp
from train.steps.guards import refuse_idle
from train.steps.objective import forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Job", "fit_many"]


@dataclass(frozen=True)
class Job:
    """One adapter's part of the training; of `config`, what concerns base, method and micro-batches is not read.

    `adapter` is what the method has built: resident on the model under its name, or members with names of their own
    (`Method.adapter_name`).
    """

    adapter: Adapter | Composite
    train: Dataset
    config: TrainConfig
    eval: Dataset | None = None
    method: Method = field(default_factory=Method)

    @property
    def name(self) -> str:
        """The adapter's; of several that are learned together, their method's."""
        return self.adapter.name if isinstance(self.adapter, Adapter) else self.method.adapter_name

    @property
    def expression(self) -> str:
        """What is active in its rows."""
        return self.adapter.name if isinstance(self.adapter, Adapter) else self.adapter.expression


class _Share:
    """Rows of one job in a step."""

    def __init__(self, job: Job, state: TrainingState) -> None:
        self.job, self.state = job, state
        self.rows = state.next_rows()
        self.items = int(job.train.items[self.rows].sum())
        self.total = torch.zeros((), device=state.device)  # the loss so far


@dataclass(frozen=True)
class _Part:
    """Rows of a share that go through the model together; the last of them when the share is through."""

    share: _Share
    rows: Tensor
    last: bool


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
    The result of each job by its name.

    Raises
    ------
    UsageError
        No job, two jobs for one adapter, tasks or precisions that one pass cannot serve together, or a method that
        needs passes of its own.
    TrainError
        A job has nothing to train, or a parameter that gets no gradient.
    NonFiniteLoss
        A job's loss or gradient broke; every job is back in its best state, and the error names the job.
    """
    _check(jobs)
    net, device_count = through or model, torch.cuda.device_count()
    before, training = compose.runtime.model_runtime.runtime(model).rows, net.training
    config = jobs[0].config
    states = {job.name: _started(job) for job in jobs}
    turns, started = max(state.result.total_steps for state in states.values()), time.perf_counter()
    try:
        with torch.random.fork_rng(devices=range(device_count)):
            for turn in range(turns):
                live = [job for job in jobs if states[job.name].going]
                if not live:
                    break
                torch.manual_seed(derive(config.seed, "dropout", turn))
                for noise in (True, False):
                    shares = [_Share(job, states[job.name]) for job in live if job.method.noise is noise]
                    net.train(noise)
                    _step(model, net, shares, rows, config.precision)
                if seconds is not None and time.perf_counter() - started >= seconds:
                    _out_of_time(states.values())
                for job in live:
                    _evaluate(model, net, job, states[job.name])
    finally:
        for state in states.values():
            state.restore_best()
        net.train(training)
        compose.activate(model, list(before) if len(before) > 1 else before[0])
    return {name: state.result for name, state in states.items()}


def _check(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    if not names or len(set(names)) < len(names):
        raise UsageError("give one job or more, each with an adapter of its own")
    for what, values in (
        ("kind of output", {job.train.task for job in jobs}),
        ("precision", {job.config.precision for job in jobs}),
    ):
        if len(values) > 1:
            raise UsageError(f"one pass has one {what}, not {' and '.join(sorted(values))}", hint="train these apart")
    for job in jobs:
        if why := why_alone(job.method):
            told = f"adapter {job.name!r}: method {job.method.name or type(job.method).__name__!r} cannot share a pass"
            raise UsageError(f"{told}: {why}", hint="train.fit trains it by itself")


def _started(job: Job) -> TrainingState:
    return TrainingState(job.adapter, job.train, job.eval, job.config, job.method, name=job.name)


def _out_of_time(states: Iterable[TrainingState]) -> None:
    for state in states:
        if state.going:
            state.result.stopped = "time"


def _step(model: PreTrainedModel, net: nn.Module, shares: Sequence[_Share], limit: int | None, precision: str) -> None:
    """One optimizer step of every job."""
    started = time.perf_counter()
    for parts in _passes(shares, limit):
        _pass(model, net, parts, precision)
        through = [part.share for part in parts if part.last]
        for share in through:
            state = share.state
            if state.result.steps == 0:
                refuse_idle(state.named)
            record = state.step(share.total, share.rows, since=started, share=len(through))
            if state.record_is_due:
                state.result.history.append(record)
        started = time.perf_counter() if through else started


def _passes(shares: Sequence[_Share], limit: int | None) -> list[list[_Part]]:
    """All rows of a step in passes of at most `limit` rows, the longest of a job first.

    A job's rows follow each other, so that it can step and let go of its gradients before the next ones have theirs.
    """
    passes: list[list[_Part]] = []
    room = 0
    for share in shares:
        order = torch.argsort(share.job.train.lengths[share.rows], descending=True, stable=True)
        pieces = torch.split(share.rows[order], limit or len(order))
        for i, rows in enumerate(pieces):
            if not passes or (limit is not None and len(rows) > room):
                passes.append([])
                room = limit or 0
            passes[-1].append(_Part(share, rows, last=i == len(pieces) - 1))
            room -= len(rows)
    return passes


def _pass(model: PreTrainedModel, net: nn.Module, parts: Sequence[_Part], precision: str) -> None:
    """Forward and backward of rows of several jobs; gradients add up in their adapters."""
    device, data = parts[0].share.state.device, parts[0].share.job.train
    batches = [{n: v.to(device) for n, v in part.share.job.train.batch(part.rows).items()} for part in parts]
    inputs = [part.share.job.method.inputs(b, data.task) for part, b in zip(parts, batches, strict=True)]
    counts = [len(own["input_ids"]) for own in inputs]
    names = [part.share.job.expression for part in parts]
    compose.activate(model, [name for name, n in zip(names, counts, strict=True) for _ in range(n)])
    with amp(device, precision):
        logits = torch.split(forward(net, _together(inputs, data.pad_id), data.task), counts)
        loss = torch.zeros((), device=device)
        for part, batch, own, out in zip(parts, batches, inputs, logits, strict=True):
            share, job = part.share, part.share.job
            term = job.method.objective(_own(out, own["labels"], job.train), batch, data.task) / share.items
            if not bool(term.isfinite()):  # its gradient would be NaN in the rows of all others too
                share.state.stop(f"loss is {float(term.detach())} on {job.train.where(part.rows)}")
            share.total += term.detach()
            loss = loss + term
    if loss.requires_grad:  # if not, nothing gets a gradient, and the first step says so by name
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


def _evaluate(model: PreTrainedModel, net: nn.Module, job: Job, state: TrainingState) -> None:
    """Measure the job by itself, when it is time."""
    if state.evaluation_is_due:
        compose.activate(model, job.expression)
        state.result.history.append(state.evaluate(net))
