"""``knots(a, b, ..., by="ties")``: merge low-rank deltas in the space that they share (arXiv:2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compose.expr.tree import Call
from compose.parameter_space.method import factored, get_method
from compose.parameter_space.options import RankOptions, check_positive, check_weights, in_any_order

if TYPE_CHECKING:
    from compose.kernels.low_rank import Pair


class KnotsOptions(RankOptions):
    """Options of ``knots``: how to merge in the shared space, and the options of that merge."""

    by: Literal["ties", "dare_ties", "dare", "linear"] = Field("ties", description="the merge in the shared space")
    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept")
    lambda_: float = Field(1.0, alias="lambda", description="factor of the merge")
    seed: int = Field(0, ge=0, description="of the random masks (dare, dare_ties)")
    rescale: Literal["density", "l1"] | None = Field("density", description="as in dare")

    @property
    def variant(self) -> str:
        """Of TIES: each layer is a space of its own, so there is no trim over the whole adapter."""
        return "mergekit"


def _check(call: Call, options: KnotsOptions) -> None:
    (check_positive if options.by.endswith("ties") else check_weights)(call, options)


def _inside(o: KnotsOptions) -> str:
    return "task_arithmetic" if o.by == "linear" else o.by


@factored(
    "knots",
    "Align low-rank deltas by one singular value decomposition of all of them, then merge there.",
    paper="arXiv:2410.19735",
    options=KnotsOptions,
    check=_check,
    canonical=in_any_order,
    otherwise=_inside,
)
def knots(pairs: Sequence[Pair], o: KnotsOptions) -> Pair:
    """`[D_1 | ... | D_n] = U S [V_1 | ... | V_n]`; the `S V_i` are merged by ``by``, and `D = U merged`.

    With `B = [B_1 ... B_n] = Q R` and `A_i^T = Q_i R_i`, `U = Q u` for the left singular vectors `u` of the small
    matrix `[R_(1) R_1^T | ... | R_(n) R_n^T]`, `R_(i)` the columns of `R` that belong to `B_i`; then
    `S V_i = u^T R_(i) s_i A_i`. So nothing of d_out x d_in is formed, and the result is a pair of rank `sum r`.
    """
    import torch

    from compose.kernels.low_rank import Pair
    from compose.parameter_space.combine import merge_tensors

    q, r = torch.linalg.qr(torch.cat([p.B.float() for p in pairs], dim=1))  # (d_out, k), (k, R)
    parts = r.split([p.rank for p in pairs], dim=1)
    cores = [part @ torch.linalg.qr(p.scale * p.A.float().T).R.T for part, p in zip(parts, pairs, strict=True)]
    u = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False).U  # (k, k)
    aligned = [{"SV": u.T @ part @ (p.scale * p.A.float())} for part, p in zip(parts, pairs, strict=True)]
    merged = merge_tensors(get_method(_inside(o)), o, aligned, aligned[0])["SV"]  # (k, d_in)
    return Pair(merged, q @ u, 1.0)
