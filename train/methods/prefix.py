"""Prefix tuning, reparametrized."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.learner.reparametrize import PrefixMLP, fold, reparametrize
from train.method import Method, MethodOptions, register


class PrefixOptions(MethodOptions):
    """How the prefix is made while it trains."""

    hidden: int = Field(512, ge=0, description="width of the MLP that makes the prefix; 0 trains it directly")


@register("prefix")
class Prefix(Method):
    """`K <- [P_K; K]`, `V <- [P_V; V]` in every layer with `P = MLP(E)` while training. Stores P alone, (n, 2 L d).

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
            reparametrize(adapter, "", "P", PrefixMLP(width, self.own.hidden, adapter.generator))

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """P as the MLP leaves it."""
        fold(learner)
        return learner
