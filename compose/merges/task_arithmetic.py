"""``task_arithmetic(a, b, ..., weights=[...], lambda=1)``: arXiv:2212.04089; for adapters arXiv:2306.14870."""

from __future__ import annotations

from pydantic import Field

from compose.parameter_space.method import linear, weights
from compose.parameter_space.options import WeightedOptions, check_weights, in_any_order


class TaskArithmeticOptions(WeightedOptions):
    """Options of ``task_arithmetic``."""

    lambda_: float = Field(1.0, alias="lambda", description="factor of the whole sum")


@linear(
    "task_arithmetic",
    "Weighted sum of the adapters' task vectors, times lambda.",
    paper="arXiv:2212.04089",
    options=TaskArithmeticOptions,
    check=check_weights,
    canonical=in_any_order,
)
def task_arithmetic(o: TaskArithmeticOptions, n: int) -> list[float]:
    """`lambda sum_i w_i tau_i`: adding task vectors adds abilities, subtracting one (w = -1) takes it away."""
    return [o.lambda_ * w for w in weights(o, n)]
