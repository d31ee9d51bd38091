"""MAM: the mix-and-match adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

import compose
from compose.kind.adapter import Adapter
from train.learner.reparametrize import PrefixMLP, fold, reparametrize
from train.method import Composite, Method, MethodOptions, register


class MamOptions(MethodOptions):
    """Sizes of the two parts; the paper's for summarization, and 16, 16, 2 for GLUE."""

    prefix_length: int = Field(30, ge=1, description="virtual tokens of the prefix")
    bottleneck_size: int = Field(512, ge=1, description="width of the parallel adapter")
    scaling: float = Field(4.0, description="s of the parallel adapter")
    hidden: int = Field(512, ge=0, description="width of the MLP that makes the prefix; 0 trains it directly")


@register("mam")
class Mam(Method):
    """A prefix in the attention and a parallel adapter beside the feed-forward block: `prefix >> bottleneck`.

    The prefix is made by an MLP while it trains. Stores both, and the composition of the two.
    """

    kind = "prefix >> bottleneck"
    paper = "arXiv:2110.04366"
    Options = MamOptions
    own: MamOptions

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """Two adapters that train together; the task's head is carried by the second."""
        front = {"num_virtual_tokens": self.own.prefix_length}
        beside = {"style": "parallel", "bottleneck_size": self.own.bottleneck_size, "scaling": self.own.scaling}
        beside |= self.kind_options
        first, second = self.member_name("prefix"), self.member_name("parallel")
        members = {
            first: self.create(model, first, "prefix", front, seed=seed),
            second: self.create(model, second, "bottleneck", beside, seed=seed + 1, heads=heads),
        }
        if self.own.hidden:
            prefix = members[first]
            mlp = PrefixMLP(prefix.at("", "P").shape[1], self.own.hidden, prefix.generator)
            reparametrize(prefix, "", "P", mlp)
        compose.activate(model, f"{first} >> {second}")
        return Composite(members, f"{first} >> {second}")

    def finish(self, model: PreTrainedModel, learner: Composite) -> Composite:
        """The prefix as the MLP leaves it."""
        fold(learner.members[self.member_name("prefix")])
        return learner
