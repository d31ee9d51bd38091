"""``magnitude_prune(a, ..., density=0.2)``: keep the largest entries of each task vector, and add."""

from __future__ import annotations

from pydantic import Field

from compose.function import FunctionSpec, register
from compose.functions._weighted import RankOptions, check_weights, in_any_order


class PruneOptions(RankOptions):
    """Options of ``magnitude_prune``."""

    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept at each place")
    lambda_: float = Field(1.0, alias="lambda", description="factor of the sum")


MAGNITUDE_PRUNE = register(
    FunctionSpec(
        "magnitude_prune",
        "merge",
        "Keep the largest entries of each task vector at each place, and add.",
        PruneOptions,
        check=check_weights,
        canonical=in_any_order,
    )
)
