"""Feature-based learning: a head on what the frozen model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.method import Composite, Method, register


@register("feature_based")
class FeatureBased(Method):
    """Trains the task's head alone on features without dropout: the floor for all other methods. Stores the head.

    No gradient enters the model below it. It takes larger rates than fine-tuning does: 1e-3 rather than 1e-5.
    """

    kind = "head"
    paper = "arXiv:1903.05987"
    noise = False  # that nothing below the head could learn to bear

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """The head is the adapter."""
        if heads:
            self.kind_options = {"target_modules": tuple(heads), **self.kind_options}
        return super().build(model, seed=seed, tokenizer=tokenizer)
