"""``task_arithmetic(a, b, ..., weights=[...], lambda=1)``: lambda times the weighted sum of task vectors.

theta = theta_0 + lambda sum_i w_i tau_i (arXiv 2212.04089).
"""

from __future__ import annotations

from pydantic import Field

from compose.function import FunctionSpec, register
from compose.functions._weighted import WeightedOptions, check_weights, in_any_order


class TaskArithmeticOptions(WeightedOptions):
    """Options of ``task_arithmetic``."""

    lambda_: float = Field(1.0, alias="lambda", description="factor of the whole sum")


TASK_ARITHMETIC = register(
    FunctionSpec(
        "task_arithmetic",
        "merge",
        "Weighted sum of the adapters' task vectors, times lambda.",
        TaskArithmeticOptions,
        check=check_weights,
        canonical=in_any_order,
    )
)
