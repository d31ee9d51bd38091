"""What the options of merges share: weights, a rank, what is checked of them, and the normal form of such a call."""

from __future__ import annotations

from typing import Any, Literal

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


class SumOptions(RankOptions):
    """Options of a weighted sum of what a trim leaves of each task vector."""

    lambda_: float = Field(1.0, alias="lambda", description="factor of the sum")


class DropOptions(SumOptions):
    """Options of the random trim of DARE."""

    density: float = Field(0.5, gt=0, le=1, description="probability that an entry is kept")
    seed: int = Field(0, ge=0, description="of the random masks")
    rescale: Literal["density", "l1"] | None = Field(
        "density", description="divide what is kept by density (the paper), scale it to the same L1 norm, or neither"
    )


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
            hint=f"to subtract an adapter, do it outside: {call.function}(a, c) + -1 * b",
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
