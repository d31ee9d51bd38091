"""How an adapter is learned: the parts of the loop that a method may do in its own way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.config import TrainConfig
from train.objective import loss_sum

__all__ = ["Method"]


class Method:
    """Gradient descent on the kind's own tensors. Other methods override what they do differently."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum of the loss over the batch's items (the loop divides by the items of the whole step)."""
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        if getattr(getattr(model, "config", None), "use_cache", False):
            inputs["use_cache"] = False  # training has no use for keys and values
        return loss_sum(task, model(**inputs).logits, batch["labels"])

    def groups(self, adapter: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer; weight decay shrinks matrices, not gains, biases or magnitudes."""
        trained = [p for p in adapter.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
        groups = (
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        )
        return [group for group in groups if group["params"]]

    def after_step(self, adapter: nn.Module, step: int) -> None:
        """Called after each optimizer step (proximal steps, masks, rewinding)."""
