"""DEMix: one expert a domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

import compose
from compose.kind.adapter import Adapter
from train.data.batches import Dataset
from train.errors import ConfigError
from train.method import Composite, Method, MethodOptions, register
from train.steps.evaluate import evaluate


class DemixOptions(MethodOptions):
    """What an expert is, and where it starts."""

    of: Literal["lora", "bottleneck", "dense"] = Field("lora", description="kind of the expert")
    start_from: tuple[str, ...] = Field(
        (), description="experts of other domains: start from the one to which the new text is least surprising"
    )
    rows: int = Field(64, ge=1, description="training rows on which these are compared")


@register("demix")
class Demix(Method):
    """An expert for the text of one domain, on a shared frozen base; a new domain may start from the closest expert.

    Over a frozen base, experts that are routed by their domain's label while training share no parameter: one after the
    other or all in one pass (train.many) gives the same experts. The closest is the argmax over experts of
    p(rows | expert), which under equal priors has the highest posterior. Stores the expert.
    """

    kind = "lora"
    paper = "arXiv:2108.05036"
    Options = DemixOptions
    own: DemixOptions

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """The experts to start from are made resident, so that one that is missing is told of now."""
        for ref in self.own.start_from:
            compose.attach(model, ref, ref)
        return super().build(model, seed=seed, heads=heads, tokenizer=tokenizer)

    def create(self, model: PreTrainedModel, name: str, kind: str, *args: Any, **options: Any) -> Adapter:
        """Of the kind that the options say."""
        return super().create(model, name, self.own.of, *args, **options)

    def warm(self, model: PreTrainedModel, learner: Adapter, data: Dataset) -> None:
        """Copy the closest expert."""
        if not self.own.start_from:
            return
        sample = data.select(torch.arange(min(self.own.rows, len(data))))
        losses = {}
        for ref in self.own.start_from:
            compose.activate(model, ref)
            losses[ref] = evaluate(model, sample)["loss"]
        self.started_from = min(losses, key=lambda ref: losses[ref])
        closest = model.moduloom.adapter(self.started_from)
        if closest.kind != learner.kind or _sizes(closest) != _sizes(learner):
            raise ConfigError(
                f"{self.started_from} is a {closest.kind} of other options than the new {learner.kind} expert",
                hint=f"options: {_sizes(closest)}",
            )
        learner.load_state({key: value.clone() for key, value in closest.state().items()})
        compose.activate(model, self.adapter_name)
        for ref in self.own.start_from:
            compose.detach(model, ref)


def _sizes(adapter: Adapter) -> dict[str, Any]:
    """What must agree for tensors to mean the same in both; where they stand, their keys and shapes say."""
    whole = adapter.config.model_dump(exclude={"target_modules", "layers", "modules_to_save"})
    return {name: value for name, value in whole.items() if "dropout" not in name}
