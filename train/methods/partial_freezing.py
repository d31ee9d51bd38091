"""Partial freezing: fine-tune the upper layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from compose.runtime.model_runtime import runtime
from train.method import Composite, Method, MethodOptions, register


class PartialFreezingOptions(MethodOptions):
    """How much trains."""

    top: int = Field(2, ge=1, description="how many of the last layers train")


@register("partial_freezing")
class PartialFreezing(Method):
    """Trains the last layers whole, and the task's head. Stores what was added to their weights."""

    kind = "dense"
    paper = "arXiv:1911.03090"
    Options = PartialFreezingOptions
    own: PartialFreezingOptions

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """The last layers of (an encoder-decoder's) deepest stack."""
        depth = 1 + max(site.layer for site in runtime(model).sites if site.layer is not None)
        self.kind_options = {"layers": tuple(range(max(0, depth - self.own.top), depth)), **self.kind_options}
        return super().build(model, seed=seed, heads=heads, tokenizer=tokenizer)
