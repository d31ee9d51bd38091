"""``average(a, b, ..., weights=[...])``: the weighted mean of adapters in parameter space.

Model soups (arXiv:2203.05482), adapter soups (arXiv:2302.07027), AdaMix (arXiv:2205.12410).
"""

from __future__ import annotations

from fractions import Fraction

from pydantic import Field

from compose.algebra.normal_form import sort_key
from compose.errors import CallError
from compose.expr.tree import Call, Expr
from compose.function import Options
from compose.parameter_space.method import linear

_ROUNDING = Fraction(1, 10**9)  # weights whose sum is this near to 1 are shares already


class AverageOptions(Options):
    """Options of ``average``."""

    weights: tuple[float, ...] | None = Field(
        None, description="one number >= 0 per adapter, divided by their sum; default: equal weights"
    )


def shares(count: int, weights: tuple[float, ...] | None) -> tuple[Fraction, ...]:
    """Weight of each of ``count`` adapters in the mean; they sum to 1 (to 1e-9, where given so)."""
    exact = [Fraction(1)] * count if weights is None else [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    return tuple(exact) if abs(total - 1) < _ROUNDING else tuple(weight / total for weight in exact)


def _check(call: Call, options: AverageOptions) -> None:
    weights = options.weights
    if weights is None:
        return
    if len(weights) != len(call.args):
        raise CallError(f"average has {len(call.args)} adapters and {len(weights)} weights", option="weights")
    if min(weights) < 0 or not any(weights):
        raise CallError(
            "the weights of a mean are not negative, and one of them is positive",
            option="weights",
            hint="to subtract an adapter write a - 0.5 * b",
        )


def _canonical(call: Call, options: AverageOptions) -> Expr:
    # The mean depends neither on the order of the adapters nor on the scale of the weights.
    merged: dict[Expr, Fraction] = {}
    for arg, share in zip(call.args, shares(len(call.args), options.weights), strict=True):
        merged[arg] = merged.get(arg, Fraction(0)) + share
    pairs = sorted(((arg, float(share)) for arg, share in merged.items() if float(share)), key=lambda p: sort_key(p[0]))
    if len(pairs) == 1:
        return pairs[0][0]
    equal = len({share for _, share in pairs}) == 1
    return Call(call.function, [arg for arg, _ in pairs], {} if equal else {"weights": [share for _, share in pairs]})


@linear(
    "average",
    "Weighted mean of the adapters' parameters: a new adapter of the same kind.",
    paper="arXiv:2203.05482",
    options=AverageOptions,
    check=_check,
    canonical=_canonical,
)
def average(o: AverageOptions, n: int) -> list[float]:
    """`sum_i w_i tau_i / sum_i w_i`, with equal weights unless ``weights`` are given."""
    return [float(share) for share in shares(n, o.weights)]
