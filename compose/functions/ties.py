"""``ties(a, b, ..., density=0.2, lambda=1)`` and ``dare_ties``: merge the entries that agree in sign.

TIES (arXiv 2306.01708) keeps the largest entries of each task vector, elects a sign for each entry by the sum, and
averages the entries that have it. Implementations differ, see ``variant``. ``dare_ties`` replaces the trim by DARE's
random one (arXiv 2311.03099).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compose.function import FunctionSpec, register
from compose.functions._weighted import RankOptions, check_positive, in_any_order


class TiesOptions(RankOptions):
    """Options of ``ties``."""

    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept, the largest ones")
    lambda_: float = Field(1.0, alias="lambda", description="factor of the merged task vector")
    variant: Literal["paper", "peft", "mergekit"] = Field(
        "paper",
        description="paper: trims the whole task vector; mergekit: each matrix; peft: each matrix, and elects the sign "
        "before the weights",
    )


class DareTiesOptions(RankOptions):
    """Options of ``dare_ties``."""

    density: float = Field(0.5, gt=0, le=1, description="probability that an entry is kept")
    lambda_: float = Field(1.0, alias="lambda", description="factor of the merged task vector")
    seed: int = Field(0, ge=0, description="of the random masks")
    rescale: Literal["density", "l1"] | None = Field(
        "density",
        description="divide what is kept by density (the paper), scale it to the same L1 norm, or neither",
    )


TIES = register(
    FunctionSpec(
        "ties",
        "merge",
        "Trim each task vector, elect a sign for each entry, average the entries that have it.",
        TiesOptions,
        check=check_positive,
        canonical=in_any_order,
    )
)
DARE_TIES = register(
    FunctionSpec(
        "dare_ties",
        "merge",
        "Drop entries at random and rescale, then elect signs and average as TIES does.",
        DareTiesOptions,
        check=check_positive,
        canonical=in_any_order,
    )
)
