"""What the doctor compares, place by place: members, result and exact merge in one set of coordinates.

Low-rank changes are written in orthonormal bases of the columns of all B and the rows of all A, where Frobenius norms
and sums are what they are in full and a place is a small matrix; methods that look at single entries get the matrices
themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compose.errors import CallError, KindError
from compose.expr.tree import Call, Ref, add
from compose.function import bind, get_function
from compose.inspection.lora_files import Contents, contents, nested
from compose.kernels import factors
from compose.kernels.low_rank import Pair
from compose.kind.registry import get_kind
from compose.parameter_space.combine import merge_tensors
from compose.parameter_space.method import Elementwise, Linear, get_method
from compose.planning.members import AdapterFinder, StoredAdapter
from hub.console.progress import Steps
from hub.errors import UsageError

Coordinates: TypeAlias = Callable[[Pair], Tensor]
_RANDOM = ("dare", "dare_ties")
_PRUNING = ("ties", "magnitude_prune")  # PEFT's combination types that can be recomputed


@dataclass(frozen=True)
class Place:
    """One site or tensor, all in the same coordinates, float64: task vectors of the members, result, exact merge.

    ``recipes``: what known ways of merging would have made, by their name.
    """

    path: str
    members: tuple[Tensor, ...]
    result: Tensor
    exact: Tensor
    recipes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A result, its members, and what it was meant to be."""

    result: StoredAdapter
    members: tuple[StoredAdapter, ...]
    weights: tuple[float, ...]
    method: str
    density: float | None

    @cached_property
    def call(self) -> Call:
        """The merge as an expression.

        Raises
        ------
        UsageError
            An option that the method does not have, or needs.
        """
        known = get_function(self.method).options.model_fields
        options: dict[str, object] = {"weights": list(self.weights)} if "weights" in known else {}
        if "density" in known:
            if self.density is None:
                raise UsageError(f"{self.method} prunes, and to what density is not said", hint="add --density 0.2")
            options["density"] = self.density
        if "variant" in known:
            options["variant"] = "peft"
        call = Call(self.method, [Ref(stored.text) for stored in self.members], options)
        try:
            bind(call)
        except CallError as error:
            raise UsageError(error.message, hint=error.hint) from error
        return call

    @property
    def coefficients(self) -> Sequence[float]:
        """The `c_i` of `sum_i c_i tau_i`, for a linear method; else the weights."""
        method = get_method(self.method)
        if isinstance(method, Linear) and not method.from_gram:
            return method.coefficients(bind(self.call), len(self.members))
        return self.weights

    def exact(self, taus: Sequence[Tensor]) -> Tensor:
        """The merge of the task vectors of one place, float64."""
        method = get_method(self.method)
        if isinstance(method, Linear) and not method.from_gram:
            return _sum(self.coefficients, taus)
        merged = merge_tensors(method, bind(self.call), [{"D": tau} for tau in taus], {"D": taus[0]})
        return merged["D"].double()

    @property
    def entrywise(self) -> bool:
        """Whether single entries of the matrices are looked at."""
        return self.density is not None or not isinstance(get_method(self.method), Linear)


def places(case: Case, finder: AdapterFinder, base: str | Path | None, progress: Steps | None) -> Iterator[Place]:
    """All places of a case, in the order of their names.

    Raises
    ------
    UsageError
        A method that cannot be recomputed.
    KindError
        Members and result whose tensors do not correspond, named.
    """
    _refuse_method(case)
    stored = (*case.members, case.result)
    read = [contents(each) for each in stored]
    if nested(read) or any(get_kind(each.kind).reads_below for each in read):
        counted = _on_base(case, finder, base)
    elif all(each.pairs for each in read):
        counted = _in_factors(case, read)
    else:
        counted = _in_tensors(case, read)
    for done, (total, place) in enumerate(counted):
        yield place
        if progress is not None:
            progress("recompute", done + 1, total)


def prescription(case: Case) -> str:
    """The command that makes the exact merge."""
    name = "cat" if case.method == "task_arithmetic" else case.method
    call = Call(name, case.call.args, case.call.options) if name == "cat" else case.call
    return f"hub compose '{call}' --merge -o NS/NAME@VERSION"


def _refuse_method(case: Case) -> None:
    if case.method in _RANDOM:
        raise UsageError(
            f"{case.method} drops entries at random, so what someone else drew cannot be recomputed",
            hint="--method task_arithmetic compares with the plain sum, which is its mean over all draws",
        )
    if not isinstance(get_method(case.method), Linear | Elementwise):
        raise UsageError(f"{case.method} is not recomputed here", hint="hub compose 'EXPR' --merge makes a new one")


def _sum(coefficients: Sequence[float], taus: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(taus[0], dtype=torch.float64)
    for c, tau in zip(coefficients, taus, strict=True):
        total += c * tau.double()
    return total


Counted: TypeAlias = Iterator[tuple[int, Place]]  # how many there are, and one of them


# -- low-rank pairs ------------------------------------------------------------------------------------------------


def _in_factors(case: Case, read: Sequence[Contents]) -> Counted:
    paths = sorted({path for each in read for path in each.pairs})
    # Whole modules are compared where the weights sum to 1: else it matters what the base has there.
    mean = math.isclose(sum(case.coefficients), 1.0, abs_tol=1e-6)
    shared = sorted({key for each in read for key in each.others if mean or ".lora_" in key})
    total = len(paths) + len(shared)
    for path in paths:
        yield total, _low_rank(case, path, [each.pairs.get(path) for each in read])
    for key in shared:
        yield total, _tensor(case, key, [each.others.get(key) for each in read])


def _low_rank(case: Case, path: str, given: Sequence[Pair | None]) -> Place:
    like = next(pair for pair in given if pair is not None)
    for pair, stored in zip(given, (*case.members, case.result), strict=True):
        if pair is not None and (pair.A.shape[1], pair.B.shape[0]) != (like.A.shape[1], like.B.shape[0]):
            raise KindError(f"{stored.text} has another shape at {path}", hint="it was made for another base")
    pairs = [pair or Pair(like.A[:0], like.B[:, :0], 1.0) for pair in given]
    at = _coordinates(pairs, dense=case.entrywise)
    taus = tuple(at(pair) for pair in pairs[:-1])
    present = [(w, p) for w, p in zip(case.weights, given[:-1], strict=True) if p is not None]
    recipes = _recipes(case, present, pairs[-1], taus, at) if present else {}
    return Place(path, taus, at(pairs[-1]), case.exact(taus), recipes)


def _coordinates(pairs: Sequence[Pair], *, dense: bool) -> Coordinates:
    if dense:
        return lambda p: p.scale * (p.B.double() @ p.A.double())
    columns = torch.linalg.qr(torch.cat([p.B.double() for p in pairs], dim=1)).Q  # (d_out, k)
    rows = torch.linalg.qr(torch.cat([p.A.double() for p in pairs]).T).Q  # (d_in, k)
    return lambda p: p.scale * (columns.T @ p.B.double()) @ (p.A.double() @ rows)


def _recipes(
    case: Case, members: Sequence[tuple[float, Pair]], result: Pair, taus: Sequence[Tensor], at: Coordinates
) -> dict[str, Tensor]:
    """What PEFT's combination types make of these members, with the scale that the result's config gives it."""
    recipes: dict[str, Tensor] = {}
    scale, rank = result.scale, result.rank
    whole = _sum(case.weights, taus)
    recipes['the exact sum, PEFT\'s "cat"'] = scale * whole
    if rank:
        recipes[f'the exact sum at rank {rank}, PEFT\'s "svd"'] = scale * _at_rank(whole, rank)
    if len({pair.rank for _, pair in members}) == 1:
        roots = [math.sqrt(abs(w * p.scale)) for w, p in members]
        signed = [math.copysign(r, w) for r, (w, _) in zip(roots, members, strict=True)]
        a = sum((r * p.A.double() for r, (_, p) in zip(signed, members, strict=True)), torch.zeros(()))
        b = sum((r * p.B.double() for r, (_, p) in zip(roots, members, strict=True)), torch.zeros(()))
        recipes['A and B summed apart, PEFT\'s "linear"'] = at(Pair(a, b, scale))
        if case.density is not None:
            for name in _PRUNING:
                recipes |= _pruned_apart(name, case.density, members, roots, signed, scale, at)
    if case.density is not None and rank:
        for name in _PRUNING:
            recipes |= _pruned_whole(name, case.density, case.weights, taus, rank, scale)
    return recipes


def _pruned_apart(
    name: str,
    density: float,
    members: Sequence[tuple[float, Pair]],
    roots: Sequence[float],
    signed: Sequence[float],
    scale: float,
    at: Coordinates,
) -> dict[str, Tensor]:
    if name == "ties" and min(signed) <= 0:  # an election has no negative votes here
        return {}
    a = _entrywise(name, density, signed, [p.A for _, p in members])
    b = _entrywise(name, density, roots, [p.B for _, p in members])
    return {f'A and B pruned and merged apart, PEFT\'s "{name}"': at(Pair(a, b, scale))}


def _pruned_whole(
    name: str, density: float, weights: Sequence[float], taus: Sequence[Tensor], rank: int, scale: float
) -> dict[str, Tensor]:
    if name == "ties" and min(weights) <= 0:
        return {}
    merged = _entrywise(name, density, weights, taus)
    return {f'{name} of the changes at rank {rank}, PEFT\'s "{name}_svd"': scale * _at_rank(merged.double(), rank)}


def _entrywise(name: str, density: float, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    options: dict[str, Any] = {"weights": list(weights), "density": density}
    if name == "ties":
        options["variant"] = "peft"
    call = Call(name, [Ref(f"m{i}") for i in range(len(tensors))], options)
    return merge_tensors(get_method(name), bind(call), [{"D": t} for t in tensors], {"D": tensors[0]})["D"]


def _at_rank(matrix: Tensor, rank: int) -> Tensor:
    pair, _ = factors.from_dense(matrix, rank)
    return (pair.B.double() @ pair.A.double()) * pair.scale


# -- other tensors -------------------------------------------------------------------------------------------------


def _in_tensors(case: Case, read: Sequence[Contents]) -> Counted:
    kinds = {each.kind for each in read}
    if len(kinds) > 1:
        named = ", ".join(f"{h.text} is {h.facts.kind}" for h in (*case.members, case.result))
        raise KindError(
            f"a merge has members of its own kind, and here {named}", hint="give the members it was made of"
        )
    keys = sorted({key for each in read for key in each.others})
    for key in keys:
        yield len(keys), _tensor(case, key, [each.others.get(key) for each in read])


def _tensor(case: Case, key: str, given: Sequence[Tensor | None]) -> Place:
    """Tensors merged as they are, relative to what changes nothing: 1 for the gains of (IA)^3, else 0."""
    like = next(value for value in given if value is not None)
    neutral = 1.0 if key.endswith("ia3_l") else 0.0
    for value, stored in zip(given, (*case.members, case.result), strict=True):
        if value is not None and value.shape != like.shape:
            got, wanted = tuple(value.shape), tuple(like.shape)
            raise KindError(f"{key} of {stored.text} has shape {got}, others have {wanted}: they do not correspond")
    taus = [torch.zeros_like(like).double() if v is None else v.double() - neutral for v in given]
    recipes = {}
    if neutral:
        present = [(w, v) for w, v in zip(case.weights, given[:-1], strict=True) if v is not None]
        plain = _sum([w for w, _ in present], [v for _, v in present]) if present else torch.zeros_like(like).double()
        recipes["the sum of the gains themselves, whose neutral value is 1 and not 0, as PEFT makes it"] = (
            plain - neutral
        )
    return Place(key, tuple(taus[:-1]), taus[-1], case.exact(taus[:-1]), recipes)


# -- kinds whose effect depends on the base ------------------------------------------------------------------------


def _on_base(case: Case, finder: AdapterFinder, base: str | Path | None) -> Counted:
    from compose.api import attach
    from compose.base.model import load_base
    from compose.inspection.explain import base_of
    from compose.parameter_space.effect import effect_of
    from compose.planning.plan import plan
    from compose.runtime.model_runtime import runtime

    stored = (*case.members, case.result)
    planned = plan(add(*(Ref(each.text) for each in stored)), finder.resolve)
    model = load_base(base or base_of(planned, finder))
    adapters = [attach(model, each.text, each.where) for each in stored]
    home = runtime(model)
    paths = sorted({path for adapter in adapters for path in adapter.module_paths})
    with torch.no_grad():
        for path in paths:
            taus = [effect_of(home, path, Ref(each.text)).dense().double() for each in stored]
            yield len(paths), Place(path, tuple(taus[:-1]), taus[-1], case.exact(taus[:-1]))
