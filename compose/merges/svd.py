"""``svd(a, b, ..., weights=[...], rank=16)``: the best low-rank approximation of the weighted sum of deltas."""

from __future__ import annotations

from compose.parameter_space.method import linear, weights
from compose.parameter_space.options import RankOptions, check_weights, in_any_order


@linear(
    "svd",
    "Best approximation of the weighted sum of low-rank deltas at a given rank; without one, the sum itself.",
    paper="doi:10.1007/BF02288367",
    options=RankOptions,
    check=check_weights,
    canonical=in_any_order,
)
def svd(o: RankOptions, n: int) -> list[float]:
    """The best approximation of `sum_i w_i D_i` of rank ``rank`` (Eckart and Young); without a rank the sum itself.

    The decomposition goes through two thin QRs and a small core, D is never formed: ``compose.kernels.factors.core``.
    """
    return weights(o, n)
