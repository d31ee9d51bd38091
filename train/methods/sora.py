"""SoRA: a LoRA whose rank is learned."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

import compose
from compose.kind.adapter import Adapter
from compose.kind.low_rank import LowRank, LowRankConfig
from train.config import TrainConfig
from train.learner.reparametrize import attributes, fold, function, reparametrize
from train.method import Method, MethodOptions, register


class SoraOptions(MethodOptions):
    """The pull of the gate towards zero."""

    sparsity: float = Field(10.0, ge=0, description="lambda: the threshold xi of a step is lambda times its rate")


class Gate(nn.Module):
    """`diag(g) A` with g (r,), one number a rank."""

    def __init__(self, rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(rank, generator=random))

    def forward(self, a: Tensor) -> Tensor:
        """(r, d_in)."""
        return self.g[:, None] * a

    def right_inverse(self, a: Tensor) -> Tensor:
        """A starts as LoRA's."""
        return a


@register("sora")
class Sora(Method):
    """`s B (g * (A x))` with a sparse gate g: after each step `g <- sign(g) relu(|g| - xi)`, the proximal step of L1.

    g starts as N(0, 1) and B as zero. At the end g is multiplied into A and ranks with g = 0 are dropped: stores A and
    B of a plain LoRA, each site with the rank it kept.
    """

    kind = "lora"
    paper = "arXiv:2311.11696"
    Options = SoraOptions
    own: SoraOptions

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """A gate before each B."""
        for path, name in attributes(adapter, "A"):
            reparametrize(adapter, path, name, Gate(len(adapter.at(path, "A")), adapter.generator))

    def groups(self, learner: Any, config: TrainConfig) -> list[dict[str, Any]]:
        """The gates by themselves, without weight decay, which would shrink them a second time."""
        gates = {id(gate.g) for gate in _gates(learner)}
        groups = super().groups(learner, config)
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in gates]} for group in groups]
        own = {"params": [gate.g for gate in _gates(learner)], "weight_decay": 0.0, "gates": True}
        return [*(group for group in rest if group["params"]), own]

    def start(self, learner: Any, optimizer: Optimizer, total_steps: int) -> None:
        """The threshold follows the learning rate."""
        self._optimizer = optimizer

    def after_step(self, learner: Any, step: int) -> None:
        """Shrink every gate by xi, through zero to zero."""
        for group in self._optimizer.param_groups:
            if group.get("gates"):
                threshold = self.own.sparsity * group["lr"]
                with torch.no_grad():
                    for g in group["params"]:
                        g.copy_(g.sign() * (g.abs() - threshold).relu())

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """A plain LoRA of the ranks that are left; where none is, of one whose A is zero."""
        assert isinstance(learner, LowRank) and isinstance(learner.config, LowRankConfig)  # noqa: S101
        ranks_left = {
            path: function(learner, path, name).get_parameter("g").detach().nonzero().flatten()
            for path, name in attributes(learner, "A")
        }
        ranks_left = {path: left for path, left in ranks_left.items() if len(left)} or {
            learner.paths[0]: torch.tensor([0])
        }
        fold(learner)
        options, power = learner.config.model_dump(), 0.5 if learner.config.use_rslora else 1.0
        scale = learner.config.scale  # stays what it was, whatever the rank
        ranks = {path: len(left) for path, left in ranks_left.items()}
        options |= {"target_modules": tuple(ranks_left), "layers": None, "rank_pattern": ranks}
        options |= {"alpha_pattern": {path: scale * rank**power for path, rank in ranks.items()}}
        plain = compose.create(model, "lora", options, name=self.adapter_name)
        with torch.no_grad():
            for path, left in ranks_left.items():
                plain.at(path, "A").copy_(learner.at(path, "A")[left])
                plain.at(path, "B").copy_(learner.at(path, "B")[:, left])
        for path in learner.saved:
            plain.head(path).load_state_dict(learner.head(path).state_dict())  # type: ignore[union-attr]
        return plain


def _gates(adapter: Adapter) -> list[Gate]:
    return [module for module in adapter.modules() if isinstance(module, Gate)]
