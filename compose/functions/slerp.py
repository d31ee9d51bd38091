"""``slerp(a, b, t=0.5)``: spherical interpolation between two task vectors, place by place."""

from __future__ import annotations

from pydantic import Field

from compose.expr.tree import Call, Expr
from compose.function import FunctionSpec, Options, register
from compose.functions._weighted import plain


class SlerpOptions(Options):
    """Options of ``slerp``."""

    t: float = Field(0.5, ge=0, le=1, description="0 is the first adapter, 1 the second")
    rank: int | None = Field(None, ge=1, description="rank of a low-rank result; default: both ranks together")


def _canonical(call: Call, options: SlerpOptions) -> Expr:
    if options.rank is None and options.t in (0, 1):
        return call.args[int(options.t)]
    return plain(call, options)


SLERP = register(
    FunctionSpec(
        "slerp",
        "merge",
        "Spherical interpolation between two task vectors.",
        SlerpOptions,
        minimum=2,
        maximum=2,
        canonical=_canonical,
    )
)
