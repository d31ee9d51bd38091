"""``knots(a, b, ..., by="ties")``: merge low-rank deltas in the space they share (arXiv 2410.19735)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compose.expr.tree import Call
from compose.function import FunctionSpec, register
from compose.functions._weighted import RankOptions, check_positive, check_weights, in_any_order


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


KNOTS = register(
    FunctionSpec(
        "knots",
        "merge",
        "Align low-rank deltas by one singular value decomposition of all of them, then merge there.",
        KnotsOptions,
        check=_check,
        canonical=in_any_order,
    )
)
