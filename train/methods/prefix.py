"""Prefix tuning, reparametrized."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.kind import Adapter
from train.method import Method, MethodOptions, register
from train.reparametrize import fold, reparametrize


class PrefixOptions(MethodOptions):
    """How the prefix is made while it trains."""

    hidden: int = Field(512, ge=0, description="width of the MLP that makes the prefix; 0 trains it directly")


class Projected(nn.Module):
    """P = W_2 tanh(W_1 E + b_1) + b_2 with E (n, h), P (n, width)."""

    def __init__(self, width: int, hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, width)
        self._random, self._hidden = random, hidden
        with torch.no_grad():
            for layer in (self.first, self.second):
                bound = layer.in_features**-0.5
                for tensor in (layer.weight, layer.bias):
                    tensor.uniform_(-bound, bound, generator=random)

    def forward(self, embedding: Tensor) -> Tensor:
        """The prefix of all layers."""
        projected: Tensor = self.second(torch.tanh(self.first(embedding)))
        return projected

    def right_inverse(self, prefix: Tensor) -> Tensor:
        """The embedding starts as normals, whatever the prefix was."""
        return torch.randn(prefix.shape[0], self._hidden, generator=self._random).to(prefix)


@register("prefix")
class Prefix(Method):
    """K <- [P_K; K], V <- [P_V; V] in every layer with P = MLP(E) while training. Stores P alone, (n, 2 L d).

    The MLP (which steadies training, as the paper found) is folded into P at the end; a checkpoint keeps it.
    """

    kind = "prefix"
    paper = "arXiv:2101.00190"
    Options = PrefixOptions
    own: PrefixOptions

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """The prefix behind its MLP."""
        if self.own.hidden:
            width = adapter.at("", "P").shape[1]
            reparametrize(adapter, "", "P", Projected(width, self.own.hidden, adapter.generator))

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """P as the MLP leaves it."""
        fold(learner)
        return learner
