"""``dare(a, b, ..., density=0.5, seed=0)``: drop entries at random, rescale, add.

tau = lambda sum_i w_i m_i tau_i / density with m_i ~ Bernoulli(density) (arXiv 2311.03099).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compose.function import FunctionSpec, register
from compose.functions._weighted import RankOptions, check_weights, in_any_order


class DareOptions(RankOptions):
    """Options of ``dare``."""

    density: float = Field(0.5, gt=0, le=1, description="probability that an entry is kept")
    lambda_: float = Field(1.0, alias="lambda", description="factor of the sum")
    seed: int = Field(0, ge=0, description="of the random masks")
    rescale: Literal["density", "l1"] | None = Field(
        "density",
        description="divide what is kept by density (the paper), scale it to the same L1 norm, or neither",
    )


DARE = register(
    FunctionSpec(
        "dare",
        "merge",
        "Drop entries of each task vector at random, rescale the rest, and add.",
        DareOptions,
        check=check_weights,
        canonical=in_any_order,
    )
)
