"""TIES: trim, elect sign, merge what agrees (arXiv:2306.01708), and its two widespread readings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compose.parameter_space.method import elementwise, weights
from compose.parameter_space.trim import largest, random


def agreeing_mean(stack: Tensor, w: Tensor, variant: str = "paper") -> Tensor:
    """Mean over the adapters whose entry has the elected sign; stack (N, rows, width), w (N,) positive.

    ``paper``: elected = sgn(sum w tau), result sum w tau [agree] / sum w [agree]; a tie elects nobody.
    ``mergekit``: the same, a tie elects plus. ``peft``: elected = sgn(sum tau), before the weights, a tie elects plus,
    and the weighted entries are divided by how many agree.
    """
    w = w.to(stack)
    total = stack.sum(0) if variant == "peft" else torch.tensordot(w, stack, dims=1)
    sign = total.sign() if variant == "paper" else torch.where(total < 0, -1.0, 1.0)
    agree: Tensor = (stack * sign).clamp_min_(0)  # |tau| where it agrees, else 0
    total = sign * torch.tensordot(w, agree, dims=1)
    votes = torch.ones_like(w) if variant == "peft" else w
    share = torch.tensordot(votes, agree.sign_(), dims=1)
    mean: Tensor = total / share.clamp_min_(torch.finfo(stack.dtype).tiny)
    return mean


@elementwise("ties", paper="arXiv:2306.01708", trim=largest, whole=lambda o: o.variant == "paper")
def ties(stack: Tensor, o: Any) -> Tensor:
    """Lambda times the mean of the trimmed entries that agree with the elected sign.

    The paper trims over the whole task vector; PEFT and mergekit trim each weight matrix by itself.
    """
    return float(o.lambda_) * agreeing_mean(stack, torch.tensor(weights(o, len(stack))), o.variant)


@elementwise("dare_ties", paper="arXiv:2311.03099", trim=random)
def dare_ties(stack: Tensor, o: Any) -> Tensor:
    """DARE's random trim and rescale, then the sign election of TIES: lambda times the mean of what agrees."""
    return float(o.lambda_) * agreeing_mean(stack, torch.tensor(weights(o, len(stack))))
