"""``svd(a, b, ..., weights=[...], rank=16)``: the best low-rank approximation of the weighted sum of deltas."""

from __future__ import annotations

from compose.function import FunctionSpec, register
from compose.functions._weighted import RankOptions, check_weights, in_any_order

SVD = register(
    FunctionSpec(
        "svd",
        "merge",
        "Best approximation of the weighted sum of low-rank deltas at a given rank; without one, the sum itself.",
        RankOptions,
        check=check_weights,
        canonical=in_any_order,
    )
)
