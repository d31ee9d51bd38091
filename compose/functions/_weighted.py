"""What the merges' options share: weights, a rank, and the normal form of a call whose arguments have no order."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from compose.algebra.normal_form import sort_key
from compose.errors import CallError
from compose.expr.tree import Call, Expr
from compose.function import Options


class WeightedOptions(Options):
    """One weight per adapter."""

    weights: tuple[float, ...] | None = Field(None, description="one number per adapter; default: 1 each")


class RankOptions(WeightedOptions):
    """Weights, and how many ranks a low-rank result keeps."""

    rank: int | None = Field(None, ge=1, description="rank of a low-rank result")


def check_weights(call: Call, options: Any) -> None:
    """Refuse a list of weights of another length than that of the adapters."""
    if options.weights is not None and len(options.weights) != len(call.args):
        raise CallError(
            f"{call.function} has {len(call.args)} adapters and {len(options.weights)} weights", option="weights"
        )


def check_positive(call: Call, options: Any) -> None:
    """As :func:`check_weights`, and refuse weights that are not positive: an election has no negative votes."""
    check_weights(call, options)
    if options.weights is not None and min(options.weights) <= 0:
        raise CallError(
            f"the weights of {call.function} are positive",
            option="weights",
            hint="to subtract an adapter write -1 * b among the arguments",
        )


def plain(call: Call, options: Options) -> Call:
    """The call without the options that have their default values."""
    return Call(call.function, call.args, options.model_dump(by_alias=True, exclude_defaults=True))


def in_any_order(call: Call, options: Any) -> Expr:
    """Normal form of a call that depends neither on the order of its adapters nor on options at their defaults."""
    weights = options.weights or (1.0,) * len(call.args)
    pairs = sorted(zip(call.args, weights, strict=True), key=lambda pair: (sort_key(pair[0]), pair[1]))
    kept = options.model_dump(by_alias=True, exclude_defaults=True)
    kept.pop("weights", None)
    if any(w != 1 for _, w in pairs):
        kept["weights"] = [w for _, w in pairs]
    return Call(call.function, [arg for arg, _ in pairs], kept)
