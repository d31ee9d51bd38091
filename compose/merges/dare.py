"""DARE: drop entries at random and rescale the rest (arXiv:2311.03099)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compose.parameter_space.combine import weighted_sum
from compose.parameter_space.method import elementwise
from compose.parameter_space.trim import random


@elementwise("dare", paper="arXiv:2311.03099", trim=random)
def dare(stack: Tensor, o: Any) -> Tensor:
    """Lambda sum_i w_i m_i tau_i / density, m_i ~ Bernoulli(density): the mean over masks is the plain sum."""
    return weighted_sum(stack, o)
