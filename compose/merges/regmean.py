"""``regmean(a, b, ..., alpha=0.9)``: the delta that answers best what each adapter answers on its own data.

Regression mean (arXiv:2212.09849): the closed form of the least `sum_i w_i ||X_i (D - D_i)^T||^2` at each linear layer,
`X_i` the inputs that adapter i sees there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from compose.parameter_space.method import factored, weights
from compose.parameter_space.options import RankOptions, check_positive, in_any_order
from compose.parameter_space.statistic import InputGram

if TYPE_CHECKING:
    from torch import Tensor

    from compose.kernels.low_rank import Pair


class RegmeanOptions(RankOptions):
    """Options of ``regmean``."""

    alpha: float = Field(0.9, ge=0, le=1, description="factor of a Gram matrix's entries off its diagonal; 1: exact")


@factored(
    "regmean",
    "The deltas whose outputs on the adapters' own inputs are nearest to those of each adapter there.",
    paper="arXiv:2212.09849",
    options=RegmeanOptions,
    check=check_positive,
    canonical=in_any_order,
    needs=InputGram,
    otherwise=lambda _: "average",
)
def regmean(pairs: Sequence[Pair], o: RegmeanOptions, grams: Sequence[Tensor]) -> Pair:
    """`D = (sum_i D_i G_i) (sum_i G_i)^-1`, `G_i = w_i (alpha X_i^T X_i + (1 - alpha) diag(X_i^T X_i))`.

    As `D = m + (sum_i D_i G_i - m S) S^+` with `S = sum_i G_i` and the mean `m = sum_i w_i D_i / sum_i w_i`, which is
    the same where S is regular, and the mean for inputs that no data has. Each `D_i = s_i B_i A_i` keeps its `B_i`, so
    the result is a pair of rank `sum r`, and nothing of d_out x d_in is formed.
    """
    import torch

    from compose.kernels.low_rank import Pair

    w = weights(o, len(pairs))
    scaled = [c * (o.alpha * g + (1 - o.alpha) * g.diag().diag()).double() for c, g in zip(w, grams, strict=True)]
    total = torch.stack(scaled).sum(0)  # (d_in, d_in)
    noise = len(total) * torch.finfo(torch.float32).eps  # relative: the Gram matrices were summed in float32
    inverse = torch.linalg.pinv(total, rtol=noise, hermitian=True)
    shares = [c / sum(w) for c in w]
    a = [
        p.scale * p.A.double() @ ((g - share * total) @ inverse + share * torch.eye(len(total)).to(total))
        for p, g, share in zip(pairs, scaled, shares, strict=True)
    ]
    return Pair(torch.cat(a).float(), torch.cat([p.B.float() for p in pairs], dim=1), 1.0)
