"""Diff pruning: a delta whose zeros are learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.config import TrainConfig
from train.learner.reparametrize import attribute, fold, function, original, reparametrize
from train.learner.sparsify import largest, places, start_again, to_sparse
from train.method import Method, MethodOptions, register
from train.steps.objective import item_count

LOW, HIGH = -1.5, 1.5  # the interval a gate is stretched to before it is clipped to [0, 1]


class DiffPruningOptions(MethodOptions):
    """The pull towards zero, and what is left in the end."""

    density: float = Field(0.005, gt=0, le=1, description="share of the weights that is left")
    penalty: float = Field(1.25e-7, ge=0, description="lambda, for each weight that is expected not to be zero")
    alpha_lr: float = Field(0.1, gt=0, description="learning rate of the gates")
    alpha_init: float = Field(5.0, description="where log alpha starts: 5 is nearly open")
    first: float = Field(0.75, gt=0, lt=1, description="share of the steps before the weights are chosen")
    second_rate: float = Field(
        1.0, gt=0, description="learning rate of the second phase over that of the first: few weights bear larger steps"
    )


class HardConcrete(nn.Module):
    """`z z_group delta`, `z = clip(s (r - l) + l, 0, 1)`, `s = sigmoid(logit u + log alpha)`, u uniform; or a mask.

    The group is the whole tensor. In evaluation the gate is at its median: u = 1/2.
    """

    mask: Tensor
    fixed: Tensor

    def __init__(self, shape: torch.Size, start: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full(shape, start))
        self.group = nn.Parameter(torch.tensor(start))
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))

    def forward(self, delta: Tensor) -> Tensor:
        """The delta behind its gates."""
        if self.fixed:
            return delta * self.mask
        return delta * self.gate(self.alpha) * self.gate(self.group)

    def gate(self, alpha: Tensor) -> Tensor:
        """A sample while training, the median otherwise."""
        noise = torch.logit(torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)) if self.training else 0.0
        return (torch.sigmoid(alpha + noise) * (HIGH - LOW) + LOW).clamp(0, 1)

    def expected(self) -> Tensor:
        """Sum over the weights of `P(z > 0) P(z_group > 0)`; `P(z > 0) = sigmoid(log alpha - log(-l / r))`."""
        shift = math.log(-LOW / HIGH)
        return torch.sigmoid(self.alpha - shift).sum() * torch.sigmoid(self.group - shift)


@register("diff_pruning")
class DiffPruning(Method):
    """`theta_0 + z z_group w` with hard-concrete gates, pruned by magnitude to 0.5% and tuned once more with that mask.

    While it trains it holds two numbers for each weight of the base. Stores indices and values; a task's head is not
    pruned.
    """

    kind = "sparse"
    paper = "arXiv:2012.07463"
    alone = "its gates are drawn anew in each pass, from the random stream of its own steps"
    Options = DiffPruningOptions
    own: DiffPruningOptions

    def create(self, model: PreTrainedModel, name: str, kind: str, *args: Any, **options: Any) -> Adapter:
        """It learns as a dense delta."""
        return super().create(model, name, "dense", *args, **options)

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """Gates on every weight."""
        for path, name in places(adapter):
            shape = getattr(adapter, attribute(path, name)).shape
            reparametrize(adapter, path, name, HardConcrete(shape, self.own.alpha_init))
        self._gates = [module for module in adapter.modules() if isinstance(module, HardConcrete)]

    def groups(self, learner: Any, config: TrainConfig) -> list[dict[str, Any]]:
        """The gates have their own rate and no weight decay."""
        self._config = config
        gates = [p for gate in self._gates for p in (gate.alpha, gate.group)]
        known = {id(p) for p in gates}
        groups = super().groups(learner, config)
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in known]} for group in groups]
        own = {"params": gates, "weight_decay": 0.0, "lr_scale": self.own.alpha_lr / config.lr}
        return [*(group for group in rest if group["params"]), own]

    def start(self, learner: Any, optimizer: Optimizer, total_steps: int) -> None:
        """When to prune."""
        self._optimizer, self._total = optimizer, total_steps
        self._choice = max(1, round(self.own.first * total_steps))

    def objective(self, logits: Tensor, batch: dict[str, Tensor], task: str) -> Tensor:
        """The task's loss and, an item at a time, `lambda E||delta||_0`."""
        loss = super().objective(logits, batch, task)
        if self._gates[0].fixed:
            return loss
        expected = torch.stack([gate.expected() for gate in self._gates]).sum()
        return loss + self.own.penalty * expected * item_count(task, batch["labels"])

    def after_step(self, learner: Any, step: int) -> None:
        """Prune by magnitude; what is left goes on from where it is."""
        if step + 1 != self._choice:
            return
        learner.eval()  # gates at their median
        moved = {place: getattr(learner, attribute(*place)).detach().clone() for place in places(learner)}
        learner.train()
        masks = largest(moved, self.own.density)
        with torch.no_grad():
            for place, delta in moved.items():
                gate = function(learner, *place)
                gate.get_buffer("mask").copy_(masks[place])
                gate.get_buffer("fixed").fill_(True)
                original(learner, *place).copy_(delta * masks[place])
        left = [original(learner, *place) for place in moved]
        start_again(self._optimizer, left, self._config, self._choice, self._total, self.own.second_rate)

    def keeps(self, step: int) -> bool:
        """Only states of the second phase are sparse."""
        return step >= self._choice

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """The places that are left and their values."""
        fold(learner)
        return to_sparse(model, learner, self.own.density, self.adapter_name)
