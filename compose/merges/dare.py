"""``dare(a, b, ..., density=0.5, seed=0)``: drop entries at random, rescale the rest, add (arXiv:2311.03099)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compose.parameter_space.method import elementwise, weighted_sum
from compose.parameter_space.options import DropOptions, check_weights, in_any_order
from compose.parameter_space.trim import random

if TYPE_CHECKING:
    from torch import Tensor


@elementwise(
    "dare",
    "Drop entries of each task vector at random, rescale the rest, and add.",
    paper="arXiv:2311.03099",
    options=DropOptions,
    check=check_weights,
    canonical=in_any_order,
    trim=random,
)
def dare(stack: Tensor, o: DropOptions) -> Tensor:
    """`lambda sum_i w_i m_i tau_i / density`, `m_i ~ Bernoulli(density)`: the mean over masks is the plain sum."""
    return weighted_sum(stack, o)
