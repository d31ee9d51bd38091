"""``ties(a, b, ..., density=0.2, lambda=1)`` and ``dare_ties``: merge the entries that agree in sign.

TIES (arXiv:2306.01708) keeps the largest entries of each task vector, elects a sign for each entry by the sum, and
averages the entries that have it. Implementations differ, see ``variant``. ``dare_ties`` replaces the trim by DARE's
random one (arXiv:2311.03099).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compose.parameter_space.method import elementwise, weights
from compose.parameter_space.options import DropOptions, SumOptions, check_positive, in_any_order
from compose.parameter_space.trim import largest, random

if TYPE_CHECKING:
    from torch import Tensor


class TiesOptions(SumOptions):
    """Options of ``ties``."""

    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept, the largest ones")
    variant: Literal["paper", "peft", "mergekit"] = Field(
        "paper",
        description="paper: trims the whole task vector; mergekit: each matrix; peft: each matrix, and elects the sign "
        "before the weights",
    )


def agreeing_mean(stack: Tensor, given: Sequence[float], variant: str = "paper") -> Tensor:
    """Mean over the adapters whose entry has the elected sign; stack (N, rows, width), positive weights ``given`` (N,).

    ``paper``: `elected = sgn(sum w tau)`, result `sum w tau [agree] / sum w [agree]`; a tie elects nobody.
    ``mergekit``: the same, a tie elects plus. ``peft``: `elected = sgn(sum tau)`, before the weights, a tie elects
    plus, and the weighted entries are divided by how many agree.
    """
    import torch

    w = stack.new_tensor(given)
    total = stack.sum(0) if variant == "peft" else torch.tensordot(w, stack, dims=1)
    sign = total.sign() if variant == "paper" else torch.where(total < 0, -1.0, 1.0)
    agree: Tensor = (stack * sign).clamp_min_(0)  # |tau| where it agrees, else 0
    total = sign * torch.tensordot(w, agree, dims=1)
    votes = torch.ones_like(w) if variant == "peft" else w
    share = torch.tensordot(votes, agree.sign_(), dims=1)
    mean: Tensor = total / share.clamp_min_(torch.finfo(stack.dtype).tiny)
    return mean


@elementwise(
    "ties",
    "Trim each task vector, elect a sign for each entry, average the entries that have it.",
    paper="arXiv:2306.01708",
    options=TiesOptions,
    check=check_positive,
    canonical=in_any_order,
    trim=largest,
    whole=lambda o: o.variant == "paper",
)
def ties(stack: Tensor, o: TiesOptions) -> Tensor:
    """Lambda times the mean of the trimmed entries that agree with the elected sign.

    The paper trims over the whole task vector; PEFT and mergekit trim each weight matrix by itself.
    """
    return o.lambda_ * agreeing_mean(stack, weights(o, len(stack)), o.variant)


@elementwise(
    "dare_ties",
    "Drop entries at random and rescale, then elect signs and average as TIES does.",
    paper="arXiv:2311.03099",
    options=DropOptions,
    check=check_positive,
    canonical=in_any_order,
    trim=random,
)
def dare_ties(stack: Tensor, o: DropOptions) -> Tensor:
    """DARE's random trim and rescale, then the sign election of TIES: lambda times the mean of what agrees."""
    return o.lambda_ * agreeing_mean(stack, weights(o, len(stack)))
