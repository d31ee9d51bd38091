"""LT-SFT: lottery-ticket sparse fine-tuning."""

from __future__ import annotations

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


class LtSftOptions(MethodOptions):
    """How much stays, and when it is chosen."""

    density: float = Field(0.005, gt=0, le=1, description="share of the moved weights that stays (K)")
    first: float = Field(0.5, gt=0, lt=1, description="share of the steps that train all of them, to choose")
    second_rate: float = Field(
        1.0, gt=0, description="learning rate of the second phase over that of the first: few weights bear larger steps"
    )


class Masked(nn.Module):
    """`mask * delta`; the mask is all ones until the choice is made."""

    mask: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def forward(self, delta: Tensor) -> Tensor:
        """Weights outside the mask cannot move, whatever momentum or weight decay do to `delta`."""
        return delta * self.mask


@register("lt_sft")
class LtSft(Method):
    """Fine-tune everything, take the K weights with the largest `|theta - theta_0|`, rewind, train only these again.

    The second phase is a run of its own: its rate starts at the peak. K counts over all parameters together and ties
    never exceed it. Stores indices and values.
    """

    kind = "sparse"
    paper = "arXiv:2110.07560"
    Options = LtSftOptions
    own: LtSftOptions

    def create(self, model: PreTrainedModel, name: str, kind: str, *args: Any, **options: Any) -> Adapter:
        """It learns as a dense delta."""
        return super().create(model, name, "dense", *args, **options)

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """A mask over each tensor."""
        for path, name in places(adapter):
            reparametrize(adapter, path, name, Masked(getattr(adapter, attribute(path, name)).shape))

    def groups(self, learner: Any, config: TrainConfig) -> list[dict[str, Any]]:
        """As ever; the second phase asks for the schedule again."""
        self._config = config
        return super().groups(learner, config)

    def start(self, learner: Any, optimizer: Optimizer, total_steps: int) -> None:
        """When to choose."""
        self._optimizer, self._total = optimizer, total_steps
        self._choice = max(1, round(self.own.first * total_steps))

    def after_step(self, learner: Any, step: int) -> None:
        """Choose and rewind, after the last step of the first phase."""
        if step + 1 != self._choice:
            return
        moved = {place: original(learner, *place) for place in places(learner)}
        masks = largest(moved, self.own.density)
        with torch.no_grad():
            for (path, name), delta in moved.items():
                delta.zero_()
                function(learner, path, name).get_buffer("mask").copy_(masks[path, name])
        run = self._config, self._choice, self._total
        start_again(self._optimizer, list(moved.values()), *run, self.own.second_rate)

    def keeps(self, step: int) -> bool:
        """Only states of the second phase are sparse."""
        return step > self._choice

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """The chosen places and their values."""
        fold(learner)
        return to_sparse(model, learner, self.own.density, self.adapter_name)
