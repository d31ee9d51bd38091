"""``cat(a, b, ..., weights=[...])``: the exact weighted sum as one adapter, every rank kept.

In the algebra it is the sum itself, so its normal form is ``w_1 * a + w_2 * b + ...``.
"""

from __future__ import annotations

from compose.expr.tree import Call, Expr, Scale, add
from compose.function import FunctionSpec, register
from compose.functions._weighted import WeightedOptions, check_weights


def _canonical(call: Call, options: WeightedOptions) -> Expr:
    weights = options.weights or (1.0,) * len(call.args)
    return add(*(Scale(w, arg) for w, arg in zip(weights, call.args, strict=True)))


CAT = register(
    FunctionSpec(
        "cat",
        "merge",
        "Exact weighted sum as one adapter, by laying tensors side by side.",
        WeightedOptions,
        check=check_weights,
        canonical=_canonical,
    )
)
