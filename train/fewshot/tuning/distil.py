"""Learning from another classifier's soft labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from train.method import Method

__all__ = ["Distil"]


class Distil(Method):
    """T^2 KL(p_T || q_T) against soft labels (arXiv:1503.02531), p the teacher's, both at temperature T."""

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum over rows; `soft` (B, C) are the teacher's logits, `labels` go unread."""
        given = {name: value for name, value in batch.items() if name not in ("labels", "soft")}
        t = self.temperature
        student = F.log_softmax(model(**given).logits / t, -1)
        teacher = F.log_softmax(batch["soft"] / t, -1)
        return t * t * F.kl_div(student, teacher, reduction="sum", log_target=True)
