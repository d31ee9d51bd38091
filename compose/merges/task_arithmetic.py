"""Task arithmetic (arXiv:2212.04089); for adapters arXiv:2306.14870."""

from __future__ import annotations

from typing import Any

from compose.parameter_space.method import linear, weights


@linear("task_arithmetic", paper="arXiv:2212.04089")
def task_arithmetic(o: Any, n: int) -> list[float]:
    """Lambda sum_i w_i tau_i: adding task vectors adds abilities, subtracting one (w = -1) takes it away."""
    return [o.lambda_ * w for w in weights(o, n)]
