"""``slerp(a, b, t=0.5)``: spherical interpolation of two task vectors, place by place (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from compose.expr.tree import Call, Expr
from compose.function import Options
from compose.parameter_space.method import linear
from compose.parameter_space.options import plain

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 1e-6  # sine of an angle under which the great circle is the straight line


class SlerpOptions(Options):
    """Options of ``slerp``."""

    t: float = Field(0.5, ge=0, le=1, description="0 is the first adapter, 1 the second")
    rank: int | None = Field(None, ge=1, description="rank of a low-rank result; default: both ranks together")


def _canonical(call: Call, options: SlerpOptions) -> Expr:
    if options.rank is None and options.t in (0, 1):
        return call.args[int(options.t)]
    return plain(call, options)


@linear(
    "slerp",
    "Spherical interpolation between two task vectors.",
    paper="doi:10.1145/325165.325242",
    from_gram=True,
    options=SlerpOptions,
    minimum=2,
    maximum=2,
    canonical=_canonical,
)
def slerp(o: SlerpOptions, gram: Tensor) -> list[float]:
    """`sin((1 - t) W) / sin W tau_0 + sin(t W) / sin W tau_1`, W the angle between `tau_0` and `tau_1` at each place.

    Parallel vectors, and opposite ones, between which no great circle is distinguished, are interpolated linearly.
    """
    t = o.t
    norms = math.sqrt(max(0.0, float(gram[0, 0] * gram[1, 1])))
    angle = math.acos(max(-1.0, min(1.0, float(gram[0, 1]) / norms))) if norms > 0 else 0.0
    if math.sin(angle) < _PARALLEL:
        return [1 - t, t]
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
