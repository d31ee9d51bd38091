"""One training and its steps: which rows come next, what an optimizer step does, which state was the best so far.

`train.loop` drives one of these, and `train.many` several over passes that they share. How the gradients come about is
theirs; what is done with them is here.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.config import TrainConfig, refuse_unmeasured, span_in_steps
from train.data.batches import Dataset, epoch_order
from train.data.datasets import check
from train.errors import NonFiniteLoss, TrainError
from train.learner.heads import head_parameters
from train.method import Method
from train.result import FitResult
from train.steps.evaluate import evaluate, rank
from train.steps.guards import explain_non_finite, is_finite
from train.steps.optimizer import learning_rate, make_optimizer

__all__ = ["TrainingState"]

log = logging.getLogger(__name__)
_LOGGED = 2000  # steps a history keeps at most: longer runs log every k-th one


class TrainingState:
    """What a learner has become, and all that decides how it goes on.

    Parameters
    ----------
    name
        What messages call it, where there are several.

    Raises
    ------
    DataError
        An empty split, or rows whose labels are all masked.
    TrainError
        Nothing to train.
    ConfigError
        Patience without held-out rows.
    """

    def __init__(
        self,
        learner: nn.Module,
        train_data: Dataset,
        eval_data: Dataset | None,
        config: TrainConfig,
        method: Method,
        *,
        name: str = "",
    ) -> None:
        if eval_data is None:
            refuse_unmeasured(config)
        for data in (train_data, eval_data):
            if data is not None:
                check(data)
        self.learner, self.method, self.config = learner, method, config
        self.train_data, self.eval_data = train_data, eval_data
        self.label = f"adapter {name!r}, " if name else ""
        self.named = {key: p for key, p in learner.named_parameters() if p.requires_grad}
        if not self.named:
            told = f"adapter {name!r}" if name else "the adapter"
            raise TrainError(f"{told} has no parameter that requires a gradient", hint="adapter.unfreeze()")
        self.parameters = list(self.named.values())
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(config, method.groups(learner, config), heads=head_parameters(learner))
        self.optimizer.zero_grad(set_to_none=True)
        self.epoch_steps = math.ceil(len(train_data) / config.batch_size)
        self.result = FitResult(total_steps=span_in_steps(config.duration, self.epoch_steps))
        self.eval_every = span_in_steps(config.eval_every, self.epoch_steps) or self.result.total_steps
        self.log_every = math.ceil(self.result.total_steps / _LOGGED)
        self.best_state: dict[str, Tensor] | None = None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # epoch, its rows
        method.start(learner, self.optimizer, self.result.total_steps)

    # -- where it stands -------------------------------------------------------------------------------------------

    @property
    def going(self) -> bool:
        """Whether it has steps left and nothing has stopped it."""
        return self.result.stopped == "finished" and self.result.steps < self.result.total_steps

    @property
    def evaluation_is_due(self) -> bool:
        """Whether there are held-out rows and it is time: every `eval_every` steps, and after the last one."""
        ended = self.result.steps == self.result.total_steps or self.result.stopped == "time"
        return self.eval_data is not None and (ended or self.result.steps % self.eval_every == 0)

    @property
    def record_is_due(self) -> bool:
        """Whether the last step is one that a history keeps."""
        return self.result.steps % self.log_every == 0 or self.result.steps == self.result.total_steps

    def next_rows(self) -> Tensor:
        """The `batch_size` rows of the next step: a function of seed and step alone."""
        epoch, index = divmod(self.result.steps, self.epoch_steps)
        size, grouped = self.config.batch_size, self.config.group_by_length
        if self._order[0] != epoch:
            order = epoch_order(self.train_data, self.config.seed, epoch, size, group_by_length=grouped)
            self._order = epoch, order
        return self._order[1][index * size : (index + 1) * size]

    # -- what happens to it ----------------------------------------------------------------------------------------

    def step(self, loss: Tensor, rows: Tensor, *, since: float, share: int = 1) -> dict[str, Any]:
        """Clip the gradients of `rows`, take the optimizer's step and let go of them; returns the step's record.

        The step has taken the time `since`, or one part in `share` of it.

        Raises
        ------
        NonFiniteLoss
            The loss or the gradient is NaN or infinite.
        """
        config, result, step = self.config, self.result, self.result.steps
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only synchronization
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.stop(explain_non_finite(loss_value, norm_value, self.train_data.where(rows), self.named))
        rate = learning_rate(config, step, result.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.step()
        self.method.after_step(self.learner, step)
        self.optimizer.zero_grad(set_to_none=True)
        items = int(self.train_data.items[rows].sum())
        result.steps, result.items = step + 1, result.items + items
        result.seconds += (time.perf_counter() - since) / share
        epoch = round(result.steps / self.epoch_steps, 4)
        values = {"step": result.steps, "epoch": epoch, "loss": loss_value, "lr": rate, "grad_norm": norm_value}
        return {**values, "items": items, "seconds": round(result.seconds, 3)}

    def evaluate(self, model: nn.Module, accelerator: Accelerator | None = None) -> dict[str, Any]:
        """Measure on the held-out rows, keep the state if it is the best one, count patience; returns the record."""
        assert self.eval_data is not None  # noqa: S101 - narrows the type
        config, result, started = self.config, self.result, time.perf_counter()
        measured = evaluate(
            model,
            self.eval_data,
            batch_size=2 * (config.micro_batch or config.batch_size),  # there are no gradients to hold
            precision=config.precision,
            accelerator=accelerator,
            logits=self.method.logits,
        )
        result.seconds += time.perf_counter() - started
        keeps, metric = self.method.keeps(result.steps), config.best_metric
        better = keeps and math.isfinite(measured["loss"])
        better = better and (result.best is None or rank(measured, metric) < rank(result.best, metric))
        if better:
            result.best, result.waited = {"step": result.steps, **measured}, 0
            self.best_state = {name: value.detach().clone() for name, value in self.learner.state_dict().items()}
        elif keeps:
            result.waited += 1
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        log.info("%sstep %d: held-out %s%s", self.label, result.steps, shown, " (best)" if better else "")
        if config.patience and result.waited >= config.patience and result.steps < result.total_steps:
            result.stopped = "patience"
            told = "%sstep %d: stopped, %d evaluations without a better one"
            log.info(told, self.label, result.steps, result.waited)
        return {"step": result.steps, "eval": measured, "best": better}

    def stop(self, broken: str) -> NoReturn:
        """Raise NonFiniteLoss before a bad step is taken, back in the best state."""
        result = self.result
        self.restore_best()
        result.stopped = "non-finite"
        kept = f"the best state, of step {result.best['step']}" if result.best else "the state before it"
        if not is_finite(self.learner):  # the step before overflowed, and nothing was evaluated since
            kept = "nothing: no state was evaluated and the last one is not finite"
        epoch = result.steps // self.epoch_steps + 1
        raise NonFiniteLoss(
            f"{self.label}step {result.steps + 1} (epoch {epoch}): {broken}; kept {kept}",
            result=result,
            hint="look at these rows; or lower lr, raise warmup, lower clip",
        )

    def restore_best(self) -> None:
        """Put the best state back into the learner; without an evaluation it stays as it is."""
        if self.best_state is not None:
            self.learner.load_state_dict(self.best_state)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the interrupted one; how rows are split may change."""
        run = self.config.model_dump(mode="json", exclude={"micro_batch", "gradient_checkpointing", "data"})
        held_out = self.eval_data.digest if self.eval_data is not None else None
        return {**run, "training data": self.train_data.digest, "held-out data": held_out}

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on; random streams need no saving (see train.seeds)."""
        tensors = {"adapter": self.learner.state_dict(), "best_state": self.best_state}
        return {**tensors, "optimizer": self.optimizer.state_dict(), "result": dict(vars(self.result))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a run that had no more time has some again."""
        self.learner.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_state = state["best_state"]
        for name, value in state["result"].items():
            setattr(self.result, name, value)
        if self.result.stopped == "time":
            self.result.stopped = "finished"
