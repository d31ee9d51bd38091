"""The effect of a static composition at one linear site: W' = W + D and c' = c + b, kept in factors where possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from compose.base.sites import linear_shape
from compose.base.weights import bias_of, dense_weight, row_norm_squared
from compose.errors import KindError
from compose.expr.tree import Expr
from compose.kernels import factors
from compose.kernels.coefficients import Coefficient
from compose.kernels.low_rank import Pair
from compose.kernels.maps import LinearMap
from compose.kind.adapter import Adapter
from compose.slots.branches import Chain, Mix
from compose.slots.lowering import LoweringContext, site_program
from compose.slots.stage import Entry, Node, Stage

_BLOCK = 2**16  # elements of a block when two dense effects are compared
_HELD: WeakKeyDictionary[nn.Module, ref[Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Effect:
    """`D = diag(gain) W + s B A`, or, where that does not hold it (``node``), whatever the compiled stages compute.

    ``gain`` is (d_out,) with 0 for no change, ``pair`` the factors, ``bias`` (d_out,) what is added to the site's
    bias, or None. An effect with none of them is zero.
    """

    layer: nn.Module
    shape: tuple[int, int]
    pair: Pair | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    node: Node | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """d_out."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """d_in."""
        return self.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the pair."""
        return self.pair.rank if self.pair is not None else 0

    @property
    def factored(self) -> bool:
        """Whether D is a pair alone."""
        return self.node is None and self.gain is None

    @property
    def device(self) -> torch.device:
        """Where the base layer lives."""
        return cast("Tensor", self.layer.weight).device

    def weight(self) -> Tensor:
        """The frozen W (d_out, d_in), float32, dequantized if need be: one temporary, shared while someone holds it."""
        held = _HELD.get(self.layer)
        weight = None if held is None else held()
        if weight is None:
            weight = dense_weight(self.layer).detach().float()
            _HELD[self.layer] = ref(weight)
        return weight

    def pair_or_zero(self) -> Pair:
        """The pair, or one of rank 0."""
        if self.pair is not None:
            return self.pair
        rows, width = self.shape
        return Pair(torch.zeros(0, width, device=self.device), torch.zeros(rows, 0, device=self.device), 1.0)

    def reader(self) -> Callable[[int, int], Tensor]:
        """Return a function that gives rows lo..hi of D, float32; what it needs of W lives as long as it does."""
        if self.node is not None:
            dense = self.dense()
            return lambda lo, hi: dense[lo:hi]
        if self.pair is None and self.gain is None:
            return lambda lo, hi: torch.zeros(hi - lo, self.width, device=self.device)
        pair = self.pair_or_zero()
        a, b = pair.A.float() * pair.scale, pair.B.float()
        if self.gain is None:
            return lambda lo, hi: b[lo:hi] @ a
        gain, weight = self.gain, self.weight()
        return lambda lo, hi: torch.addmm(gain[lo:hi, None] * weight[lo:hi], b[lo:hi], a)

    def dense(self) -> Tensor:
        """`D` whole, (d_out, d_in) float32."""
        if self.node is None:
            return self.reader()(0, self.rows)
        weight = self.weight()
        return weight_after(self.node, weight) - weight

    def key(self) -> bytes:
        """Digest of the content: seeds that depend on it do not depend on names or order."""
        digest = blake2b(digest_size=8)
        if self.node is not None:
            digest.update(_bytes(self.dense()))
        elif self.pair is not None:
            digest.update(_bytes(self.pair.A) + _bytes(self.pair.B) + repr(self.pair.scale).encode())
        if self.gain is not None:
            digest.update(_bytes(self.gain))
        return digest.digest()

    def inner(self, other: Effect) -> float:
        """Frobenius product <D, D'> with another effect at the same site; in factor space but for dense effects."""
        if self.node is not None or other.node is not None:
            mine, theirs = self.reader(), other.reader()
            step = max(1, _BLOCK // self.width)
            spans = [(lo, min(lo + step, self.rows)) for lo in range(0, self.rows, step)]
            return sum(float((mine(*s).double() * theirs(*s)).sum()) for s in spans)
        total = factors.inner(self.pair_or_zero(), other.pair_or_zero()) if self.rank and other.rank else 0.0
        if self.gain is not None and other.gain is not None:
            total += float((self.gain.double() * other.gain * row_norm_squared(self.layer)).sum())
        return total + self._gain_with_pair(other) + other._gain_with_pair(self)

    def _gain_with_pair(self, other: Effect) -> float:
        """<diag(u) W, s B A> = s sum_j u_j rowsum((W A^T) * B)_j."""
        if self.gain is None or other.pair is None:
            return 0.0
        pair = other.pair
        rows = ((self.weight() @ pair.A.float().T) * pair.B.float()).sum(1)
        return pair.scale * float((self.gain.double() * rows).sum())

    @cached_property
    def energy(self) -> float:
        """`||D||^2`."""
        return self.inner(self)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


# -- from an expression ------------------------------------------------------------------------------------------


class _Unweighted:
    """A context without weights given by name: a merge is made once, so only the numbers in its expression count."""

    def __init__(self, context: LoweringContext) -> None:
        self.adapters = context.adapters
        self.weights: Mapping[str, Coefficient] = {}
        self.sites, self.slot = context.sites, context.slot


def effect_of(context: LoweringContext, path: str, expr: Expr) -> Effect:
    """Effect of a call-free expression at the site ``path``.

    Raises
    ------
    KindError
        Names the adapter whose effect there is no change of a weight (a block function).
    """
    slot = context.slot(path)
    node = site_program(_Unweighted(context), path, (expr,))
    layer = slot.layer
    shape = _shape(layer)
    if node is None:
        return Effect(layer, shape)
    _refuse_functions(context.adapters, path, node)
    bias = _moved_bias(layer, shape[0], node)
    if isinstance(node, Stage) and not node.inputs and not node.deltas:
        return Effect(layer, shape, *_in_factors(node), bias)
    return Effect(layer, shape, bias=bias, node=node)


def _shape(layer: nn.Module) -> tuple[int, int]:
    linear = linear_shape(layer)  # (d_in, d_out), without a look at the weight, which may be quantized
    if linear is not None:
        return linear[1], linear[0]
    return int(cast("Tensor", layer.weight).shape[0]), 0  # a normalization layer: it has a bias to move, no matrix


def _moved_bias(layer: nn.Module, rows: int, node: Node) -> Tensor | None:
    own = bias_of(layer)
    before = torch.zeros(rows, device=cast("Tensor", layer.weight).device) if own is None else own.detach().float()
    after = bias_after(node, before)
    if after is before:
        return None
    moved = after - before
    return moved if bool(moved.any()) else None


def _refuse_functions(adapters: Mapping[str, Adapter], path: str, node: Node) -> None:
    for entry in entries(node):
        if entry.atoms.function is not None:
            kind = adapters[entry.name].kind
            raise KindError(
                f"{kind} adapter {entry.name!r} is a function at {path}, not a change of its weight",
                hint="merge adapters of one such kind with each other, or activate the expression as it is",
            )


def entries(node: Node) -> list[Entry]:
    """All entries of a compiled node."""
    if isinstance(node, Stage):
        return list(node.entries)
    nodes = node.parts if isinstance(node, Chain) else [n for _, n in cast("Mix", node).terms]
    return [e for n in nodes for e in entries(n)]


def _in_factors(stage: Stage) -> tuple[Pair | None, Tensor | None]:
    pairs = [Pair(_f(e.atoms.A), _f(e.atoms.B), e.atoms.scale) for e in stage.low_rank]
    weights = [float(e.coefficient) for e in stage.low_rank]
    gain = _sum((float(e.coefficient), _f(e.atoms.gain) - 1) for e in stage.gains)
    if len(pairs) == 1:
        return Pair(pairs[0].A, pairs[0].B, pairs[0].scale * weights[0]), gain
    return factors.stack(pairs, weights) if pairs else None, gain


def _f(tensor: Tensor | None) -> Tensor:
    return cast("Tensor", tensor).detach().float()


def _sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor | None:
    total: Tensor | None = None
    for weight, tensor in terms:
        total = weight * tensor if total is None else total + weight * tensor
    return total


@torch.no_grad()
def weight_after(node: Node, weight: Tensor) -> Tensor:
    """`W'` that a compiled node makes of `W` (d_out, d_in), float32.

    A stage: W' = diag(1 + sum w (g - 1)) W diag(1 + sum w (l - 1)) + sum w (s B A + D), see :mod:`compose.atoms`;
    a chain applies its parts in turn, a mix adds its branches' differences.
    """
    if isinstance(node, Chain):
        for part in node.parts:
            weight = weight_after(part, weight)
        return weight
    if isinstance(node, Mix):
        moved = (float(c) * (weight_after(n, weight) - weight) for c, n in node.terms)
        return weight + sum(moved, torch.zeros_like(weight))
    stage = cast("Stage", node)
    gains = _sum((float(e.coefficient), _f(e.atoms.gain) - 1) for e in stage.gains)
    inputs = _sum((float(e.coefficient), _f(e.atoms.input_gain) - 1) for e in stage.inputs)
    new = weight if gains is None else weight * (1 + gains)[:, None]
    new = new if inputs is None else new * (1 + inputs)
    for e in stage.low_rank:
        new = new + (float(e.coefficient) * e.atoms.scale) * (_f(e.atoms.B) @ _f(e.atoms.A))
    for e in stage.deltas:
        new = new + float(e.coefficient) * cast("LinearMap", e.atoms.delta).dense().detach().float()
    return new


@torch.no_grad()
def bias_after(node: Node, bias: Tensor) -> Tensor:
    """`c'` that a compiled node makes of the bias `c` (d_out,): gains that scale the bias, then the biases added."""
    if isinstance(node, Chain):
        for part in node.parts:
            bias = bias_after(part, bias)
        return bias
    if isinstance(node, Mix):
        return bias + sum((float(c) * (bias_after(n, bias) - bias) for c, n in node.terms), torch.zeros_like(bias))
    stage = cast("Stage", node)
    scaled = _sum((float(e.coefficient), _f(e.atoms.gain) - 1) for e in stage.gains if e.atoms.gain_scales_bias)
    after = bias if scaled is None else bias * (1 + scaled)
    for e in stage.biases:
        after = after + float(e.coefficient) * _f(e.atoms.bias)
    return after
