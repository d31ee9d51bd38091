"""Several processes, one result: gradients are summed in one message a step.

The model is not wrapped: an adapter is small, so its gradients travel as one flat vector, and the loss of a step stays
a sum over items divided by the items of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

__all__ = ["sum_gradients"]


def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor, accelerator: Accelerator) -> Tensor:
    """Add up the gradients (in place) and the loss (returned) of all processes; with one process, nothing to do."""
    if accelerator.num_processes == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:  # this process had no rows in a small last step
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten().float() for g in gradients] + [loss.flatten()])
    flat = accelerator.reduce(flat, reduction="sum")
    for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    total: Tensor = flat[-1]
    return total
