"""The weighted sum written with a given rank."""

from __future__ import annotations

from typing import Any

from compose.parameter_space.method import linear, weights


@linear("svd", paper="doi:10.1007/BF02288367")
def svd(o: Any, n: int) -> list[float]:
    """The best approximation of sum_i w_i D_i of rank ``rank`` (Eckart and Young); without a rank the sum itself.

    The decomposition goes through two thin QRs and a small core, D is never formed: ``compose.kernels.factors.core``.
    """
    return weights(o, n)
