"""``fisher(a, b, ...)``: the mean of task vectors, each entry weighted by how much the adapter's loss depends on it.

Fisher merging (arXiv:2111.09832), with the diagonal of the empirical Fisher information.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compose.parameter_space.method import elementwise, weights
from compose.parameter_space.options import RankOptions, check_positive, in_any_order
from compose.parameter_space.statistic import SquaredGradient

if TYPE_CHECKING:
    from torch import Tensor


@elementwise(
    "fisher",
    "Mean of the task vectors, entry by entry weighted by the Fisher information of each adapter on its data.",
    paper="arXiv:2111.09832",
    options=RankOptions,
    check=check_positive,
    canonical=in_any_order,
    needs=SquaredGradient,
    otherwise=lambda _: "average",
)
def fisher(stack: Tensor, o: RankOptions, squares: Sequence[Tensor]) -> Tensor:
    """`sum_i w_i F_i tau_i / sum_i w_i F_i`, and the weighted mean where no loss depends on an entry."""
    import torch

    w = stack.new_tensor(weights(o, len(stack)))[:, None, None]
    information = w * torch.stack(list(squares))
    information = torch.where(information.sum(0) > 0, information, w)
    merged: Tensor = (information * stack).sum(0) / information.sum(0)
    return merged
