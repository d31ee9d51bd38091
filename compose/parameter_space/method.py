"""What a merge method is: one decorated function of ten lines, in one of three forms.

=============  =============================================================  ==============================
form           the function                                                   examples
=============  =============================================================  ==============================
``linear``     coefficients c_i of sum_i c_i tau_i                            average, task_arithmetic, slerp
``elementwise``  tau from the stacked (N, ...) entries of all tau_i, after a trim  ties, dare
``factored``   one pair (A, B) from the pairs of all adapters                 knots
=============  =============================================================  ==============================

tau_i is the task vector of adapter i: at a linear site its delta D_i = s B A (never A and B apart, whose products would
mix adapters), for (IA)^3 l - 1, for a bias b, for kinds whose effect is no linear function of their tensors the tensors
themselves. Files under ``compose/merges/`` and entry points ``hub.merges`` register methods; their names and options
are declared under ``compose/functions/``, which needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from compose.errors import KindError
from compose.kernels.low_rank import Pair
from compose.kind.adapter import Adapter, KindConfig
from compose.parameter_space.trim import Trim, all_of_it
from hub.plugins import discover

Coefficients: TypeAlias = Callable[..., Sequence[float]]  # (options, n) or, from the inner products, (options, gram)
Combine: TypeAlias = Callable[[Tensor, Any], Tensor]  # (N, rows, width), options -> (rows, width)
OnPairs: TypeAlias = Callable[[Sequence[Pair], Any], Pair]
Join: TypeAlias = Callable[[Sequence[tuple[float, Adapter]]], tuple[KindConfig, dict[tuple[str, str], Tensor]]]


@dataclass(frozen=True)
class Linear:
    """`sum_i c_i tau_i`. ``from_gram``: c is made from the (N, N) inner products of the tau_i at each place.

    ``join`` lays the tensors of adapters side by side where the kind is not linear in them (prefixes, bottlenecks).
    """

    name: str
    paper: str
    coefficients: Coefficients
    from_gram: bool = False
    join: Join | None = None


@dataclass(frozen=True)
class Elementwise:
    """``combine`` of what ``trim`` leaves; ``whole`` says whether it looks at the whole adapter or at each place."""

    name: str
    paper: str
    combine: Combine
    trim: Trim = all_of_it
    whole: Callable[[Any], bool] = lambda _: False


@dataclass(frozen=True)
class Factored:
    """A new pair from pairs. ``otherwise`` names the method for tensors that are no pairs (heads carried along)."""

    name: str
    paper: str
    on_pairs: OnPairs
    otherwise: Callable[[Any], str]


Method: TypeAlias = Linear | Elementwise | Factored
_METHODS: dict[str, Method] = {}
_F = TypeVar("_F", bound=Callable[..., Any])


def _add(method: Method) -> None:
    if method.name in _METHODS:
        raise KindError(f"merge {method.name!r} is registered twice")
    _METHODS[method.name] = method


def linear(name: str, *, paper: str, from_gram: bool = False, join: Join | None = None) -> Callable[[_F], _F]:
    """Register a function (options, n) -> coefficients; with ``from_gram``, (options, gram) -> coefficients."""

    def register(function: _F) -> _F:
        _add(Linear(name, paper, function, from_gram, join))
        return function

    return register


def elementwise(
    name: str, *, paper: str, trim: Trim = all_of_it, whole: Callable[[Any], bool] = lambda _: False
) -> Callable[[_F], _F]:
    """Register a function (stack (N, rows, width), options) -> (rows, width), called on blocks of rows."""

    def register(function: _F) -> _F:
        _add(Elementwise(name, paper, function, trim, whole))
        return function

    return register


def factored(name: str, *, paper: str, otherwise: Callable[[Any], str]) -> Callable[[_F], _F]:
    """Register a function (pairs, options) -> pair."""

    def register(function: _F) -> _F:
        _add(Factored(name, paper, function, otherwise))
        return function

    return register


def methods() -> dict[str, Method]:
    """All merge methods by name."""
    discover("compose.merges", "hub.merges")
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The merge called ``name``."""
    known = methods()
    if name not in known:
        raise KindError(f"{name}(...) does not merge parameters", hint="merges: " + ", ".join(known))
    return known[name]


def weights(o: Any, n: int) -> list[float]:
    """The weights given in the options, or 1 for each of ``n`` adapters."""
    return [float(w) for w in o.weights] if o.weights is not None else [1.0] * n
