"""KnOTS: merge in the space that the deltas share (arXiv:2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compose.kernels.low_rank import Pair
from compose.parameter_space.combine import merge_tensors
from compose.parameter_space.method import factored, get_method


def _inside(o: Any) -> str:
    return "task_arithmetic" if o.by == "linear" else str(o.by)


@factored("knots", paper="arXiv:2410.19735", otherwise=_inside)
def knots(pairs: Sequence[Pair], o: Any) -> Pair:
    """[D_1 | ... | D_n] = U S [V_1 | ... | V_n]; the S V_i are merged by ``by``, and D = U merged.

    With B = [B_1 ... B_n] = Q R and A_i^T = Q_i R_i, U = Q u for the left singular vectors u of the small matrix
    [R_(1) R_1^T | ... | R_(n) R_n^T], R_(i) the columns of R that belong to B_i; then S V_i = u^T R_(i) s_i A_i. So
    nothing of d_out x d_in is formed, and the result is a pair of rank sum r.
    """
    q, r = torch.linalg.qr(torch.cat([p.B.float() for p in pairs], dim=1))  # (d_out, k), (k, R)
    parts = r.split([p.rank for p in pairs], dim=1)
    cores = [part @ torch.linalg.qr(p.scale * p.A.float().T).R.T for part, p in zip(parts, pairs, strict=True)]
    u = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False).U  # (k, k)
    aligned = [{"SV": u.T @ part @ (p.scale * p.A.float())} for part, p in zip(parts, pairs, strict=True)]
    merged = merge_tensors(get_method(_inside(o)), o, aligned, aligned[0])["SV"]  # (k, d_in)
    return Pair(merged, q @ u, 1.0)
