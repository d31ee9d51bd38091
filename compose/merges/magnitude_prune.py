"""Magnitude pruning of each task vector, then their weighted sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compose.parameter_space.combine import weighted_sum
from compose.parameter_space.method import elementwise
from compose.parameter_space.trim import largest


@elementwise("magnitude_prune", paper="arXiv:1506.02626", trim=largest)
def magnitude_prune(stack: Tensor, o: Any) -> Tensor:
    """Lambda sum_i w_i tau_i, each tau_i with only its ``density`` of largest entries at each place."""
    return weighted_sum(stack, o)
