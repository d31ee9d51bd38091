"""Learning from another classifier's soft labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from train.method import Method

__all__ = ["Distillation"]


class Distillation(Method):
    """`T^2 KL(p_T || q_T)` against soft labels (arXiv:1503.02531), p the teacher's, both at temperature T."""

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def inputs(self, batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
        """The rows without the teacher's logits."""
        return {name: value for name, value in batch.items() if name != "soft"}

    def objective(self, logits: Tensor, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum over rows; `soft` (B, C) are the teacher's logits, `labels` go unread."""
        t = self.temperature
        student = F.log_softmax(logits / t, -1)
        teacher = F.log_softmax(batch["soft"] / t, -1)
        return t * t * F.kl_div(student, teacher, reduction="sum", log_target=True)
