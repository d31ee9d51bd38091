"""``lorahub(a, b, ..., weights=[...])``: weights searched on a few examples (arXiv 2307.13269).

The search needs data and a score, so it is a Python function, ``compose.merges.lorahub.search``; it returns this call
with the weights it found, which is then an expression like any other.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compose.function import FunctionSpec, register
from compose.functions._weighted import RankOptions, check_weights, in_any_order


class LorahubOptions(RankOptions):
    """Options of ``lorahub``."""

    variant: Literal["paper", "exact"] = Field(
        "paper", description="paper: A = sum w A_i and B = sum w B_i, with cross terms; exact: sum w B_i A_i"
    )


LORAHUB = register(
    FunctionSpec(
        "lorahub",
        "merge",
        "Sum of LoRAs with weights that were searched, without gradients, on a few examples.",
        LorahubOptions,
        check=check_weights,
        canonical=in_any_order,
    )
)
