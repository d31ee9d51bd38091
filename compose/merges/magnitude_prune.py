"""``magnitude_prune(a, ..., density=0.2)``: keep the largest entries of each task vector, and add."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from compose.parameter_space.method import elementwise, weighted_sum
from compose.parameter_space.options import SumOptions, check_weights, in_any_order
from compose.parameter_space.trim import largest

if TYPE_CHECKING:
    from torch import Tensor


class PruneOptions(SumOptions):
    """Options of ``magnitude_prune``."""

    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept at each place")


@elementwise(
    "magnitude_prune",
    "Keep the largest entries of each task vector at each place, and add.",
    paper="arXiv:1506.02626",
    options=PruneOptions,
    check=check_weights,
    canonical=in_any_order,
    trim=largest,
)
def magnitude_prune(stack: Tensor, o: PruneOptions) -> Tensor:
    """`lambda sum_i w_i tau_i`, each `tau_i` with only its ``density`` of largest entries at each place."""
    return weighted_sum(stack, o)
