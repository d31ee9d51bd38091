"""Ladder side-tuning."""

from __future__ import annotations

from torch import Tensor, nn

from train.method import Method, register


@register("lst")
class LadderSideTuning(Method):
    """A small side network of width d / 8 that reads the frozen model's hidden states through learned gates.

    s_i = Block_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i), mu = sigmoid(a / T), a = 0 at first, T = 0.1. No gradient enters
    the model, so its activations are not kept: that is what saves memory. The blocks start from fresh values. Stores
    the side network.
    """

    kind = "ladder"
    paper = "arXiv:2206.06522"

    def logits(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """The frozen model is read without dropout, which could only blur what the ladder sees."""
        model.eval()
        return super().logits(model, batch, task)
