"""What a merge is: one file with its name, its options and one decorated function of ten lines, in one of three forms.

===============  ===============================================================  =============================
form             the function                                                     examples
===============  ===============================================================  =============================
``linear``       coefficients `c_i` of `sum_i c_i tau_i`                          average, task_arithmetic, slerp
``elementwise``  tau from the stacked (N, ...) entries of all `tau_i`, after a trim  ties, dare, fisher
``factored``     one pair (A, B) from the pairs of all adapters                   knots, regmean
===============  ===============================================================  =============================

`tau_i` is the task vector of adapter i: at a linear site its delta `D_i = s B A` (never A and B apart, whose products
would mix adapters), for (IA)^3 `l - 1`, for a bias `b`, for kinds whose effect is no linear function of their tensors
the tensors themselves. Files under ``compose/merges/`` and entry points ``hub.merges`` register merges. Expressions are
parsed with what they declare, so these files import torch only inside functions, and this one not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, cast

from compose.errors import KindError
from compose.expr.tree import Call, Expr
from compose.function import FUNCTIONS, MERGES, FunctionSpec, Options

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    from compose.kernels.low_rank import Pair
    from compose.kind.adapter import Adapter, KindConfig
    from compose.parameter_space.statistic import Statistic
    from compose.parameter_space.trim import Trim

    Join: TypeAlias = Callable[[Sequence[tuple[float, Adapter]]], tuple[KindConfig, dict[tuple[str, str], Tensor]]]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Merge(FunctionSpec):
    """What the three forms share.

    Parameters
    ----------
    paper
        Where the method is from.
    needs
        What is measured of each adapter on data, at each linear site; the function is given it as a last argument, one
        tensor per adapter. Without data such a merge is refused.
    otherwise
        Names, from the options, the merge for tensors that this one is not defined for: heads carried along, biases.
    """

    paper: str
    needs: type[Statistic] | None = None
    otherwise: Callable[[Any], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Linear(Merge):
    """`sum_i c_i tau_i`. ``from_gram``: c is made from the (N, N) inner products of the tau_i at each place.

    ``join`` lays the tensors of adapters side by side where the kind is not linear in them (prefixes, bottlenecks).
    """

    coefficients: Callable[..., Sequence[float]]  # (options, n) or, from the inner products, (options, gram)
    from_gram: bool = False
    join: Join | None = None


@dataclass(frozen=True, kw_only=True)
class Elementwise(Merge):
    """``combine`` of what ``trim`` leaves; ``whole`` says whether it looks at the whole adapter or at each place."""

    combine: Callable[..., Tensor]  # (N, rows, width), options -> (rows, width)
    trim: Trim | None = None
    whole: Callable[[Any], bool] = lambda _: False


@dataclass(frozen=True, kw_only=True)
class Factored(Merge):
    """A new pair from pairs."""

    on_pairs: Callable[..., Pair]  # pairs, options -> pair


Method: TypeAlias = Linear | Elementwise | Factored


class _Facts(TypedDict, total=False):
    """What all three decorators take beside the name and one sentence; see `FunctionSpec` and `Merge`."""

    paper: str
    options: type[Options]
    minimum: int
    maximum: int | None
    check: Callable[[Call, Any], None]
    canonical: Callable[[Call, Any], Expr]
    needs: type[Statistic] | None
    otherwise: Callable[[Any], str] | None


def linear(
    name: str, summary: str, *, from_gram: bool = False, join: Join | None = None, **facts: Unpack[_Facts]
) -> Callable[[_F], _F]:
    """Register a function (options, n) -> coefficients; with ``from_gram``, (options, gram) -> coefficients."""
    return _registered(
        lambda f: Linear(name, "merge", summary, coefficients=f, from_gram=from_gram, join=join, **facts)
    )


def elementwise(
    name: str,
    summary: str,
    *,
    trim: Trim | None = None,
    whole: Callable[[Any], bool] = lambda _: False,
    **facts: Unpack[_Facts],
) -> Callable[[_F], _F]:
    """Register a function (stack (N, rows, width), options) -> (rows, width), called on blocks of rows."""
    return _registered(lambda f: Elementwise(name, "merge", summary, combine=f, trim=trim, whole=whole, **facts))


def factored(name: str, summary: str, **facts: Unpack[_Facts]) -> Callable[[_F], _F]:
    """Register a function (pairs, options) -> pair."""
    return _registered(lambda f: Factored(name, "merge", summary, on_pairs=f, **facts))


def _registered(make: Callable[[_F], Method]) -> Callable[[_F], _F]:
    def add(function: _F) -> _F:
        merge = make(function)
        # Where it was written: errors name it, and the same file imported again registers the same merge again.
        vars(merge).update(__module__=function.__module__, __qualname__=function.__qualname__)
        FUNCTIONS.add(merge.name, merge)
        MERGES.add(merge.name, merge)
        return function

    return add


def methods() -> dict[str, Method]:
    """All merges by name."""
    return {name: cast("Method", merge) for name, merge in MERGES.all().items()}


def get_method(name: str) -> Method:
    """The merge called ``name``."""
    if name not in MERGES:
        raise KindError(f"{name}(...) does not merge parameters", hint="merges: " + ", ".join(MERGES))
    return cast("Method", MERGES.get(name))


def need_data(expr: Expr) -> list[Call]:
    """The merges in an expression that measure something on data."""
    calls = [node for node in expr.walk() if isinstance(node, Call) and node.function in MERGES]
    return [call for call in calls if get_method(call.function).needs is not None]


def refuse_without_data(expr: Expr) -> None:
    """KindError, before any tensor is read, for a merge that measures something on data where there is none."""
    for call in need_data(expr):
        raise KindError(
            f"{call}: {call.function} measures its adapters on data, and none is given",
            hint="compose.merge(model, expr, data=batches), or hub compose EXPR --merge --data FILE -o NS/NAME@VERSION",
        )


# -- what their functions are written with -------------------------------------------------------------------------


def weights(o: Any, n: int) -> list[float]:
    """The weights given in the options, or 1 for each of ``n`` adapters."""
    return [float(w) for w in o.weights] if o.weights is not None else [1.0] * n


def weighted_sum(stack: Tensor, o: Any) -> Tensor:
    """`lambda sum_i w_i tau_i` over the first dimension of ``stack`` (N, rows, width)."""
    w = o.lambda_ * stack.new_tensor(weights(o, len(stack)))
    total: Tensor = w[None] @ stack.flatten(1)  # as torch.tensordot does it
    return total.view(stack.shape[1:])
