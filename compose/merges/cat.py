"""``cat(a, b, ..., weights=[...])``: the exact weighted sum as one adapter, by laying tensors side by side.

In the algebra it is the sum itself, so its normal form is ``w_1 * a + w_2 * b + ...``.

For low-rank pairs A and B are stacked (the CAT of LoRA Soups, arXiv:2410.13025, with weights given), gains and biases
add, and for the kinds that are not linear in their tensors:

- prefix, prompt: the virtual tokens one after the other;
- bottleneck: the hidden units side by side, s_i W_u,i folded together and the output biases added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from compose.errors import KindError
from compose.expr.tree import Call, Expr, Scale, add
from compose.parameter_space.method import linear, weights
from compose.parameter_space.options import WeightedOptions, check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from compose.kind.adapter import Adapter, KindConfig

    _Joined: TypeAlias = tuple[KindConfig, dict[tuple[str, str], Tensor]]
    _Terms: TypeAlias = Sequence[tuple[float, Adapter]]


def join(terms: _Terms) -> _Joined:
    """Config and tensors, by (path, name), of the adapter that does what ``sum_i w_i a_i`` does.

    Raises
    ------
    KindError
        For a kind whose tensors cannot be laid side by side, a weight it has no place for, or configs that differ in
        more than their size.
    """
    kind = terms[0][1].kind
    if kind not in _JOINS:
        raise KindError(f"cat: the tensors of kind {kind!r} cannot be laid side by side", hint="a + b applies both")
    return _JOINS[kind](terms)


def _same_but(terms: _Terms, *sizes: str) -> Adapter:
    first = terms[0][1]
    for _, other in terms[1:]:
        mine, theirs = first.config.model_dump(exclude=set(sizes)), other.config.model_dump(exclude=set(sizes))
        if mine != theirs:
            odd = next(name for name in mine if mine[name] != theirs[name])
            raise KindError(f"cat: {first.kind} {first.name!r} and {other.name!r} differ in {odd}")
    return first


def _virtual_tokens(terms: _Terms) -> _Joined:
    import torch

    first = _same_but(terms, "num_virtual_tokens", "init", "init_std")
    for w, adapter in terms:
        if w != 1:
            raise KindError(f"cat: {adapter.kind} {adapter.name!r} has weight {w:g}, and its tokens are there or not")
    tokens = torch.cat([a.at("", "P").detach() for _, a in terms])  # (n_1 + n_2 + ..., width)
    return first.config.model_copy(update={"num_virtual_tokens": tokens.shape[0]}), {("", "P"): tokens}


def _bottlenecks(terms: _Terms) -> _Joined:
    import torch

    first = _same_but(terms, "reduction_factor", "bottleneck_size", "scaling", "init", "dropout")
    scaled = [(w * getattr(a.config, "scaling", 1.0), a) for w, a in terms]
    state: dict[tuple[str, str], Tensor] = {}
    for path in first.paths:
        state[path, "down"] = torch.cat([a.at(path, "down").detach() for _, a in scaled])
        state[path, "down_b"] = torch.cat([a.at(path, "down_b").detach() for _, a in scaled])
        state[path, "up"] = torch.cat([s * a.at(path, "up").detach() for s, a in scaled], dim=1)
        state[path, "up_b"] = torch.stack([s * a.at(path, "up_b").detach() for s, a in scaled]).sum(0)
    widths = {len(value) for (_, name), value in state.items() if name == "down_b"}
    if len(widths) > 1:
        raise KindError(f"cat: {first.name!r} has bottlenecks of different widths {sorted(widths)} at different sites")
    return first.config.model_copy(update={"bottleneck_size": widths.pop(), "scaling": 1.0, "dropout": 0.0}), state


_JOINS: dict[str, Callable[[_Terms], _Joined]] = {
    "prefix": _virtual_tokens,
    "prompt": _virtual_tokens,
    "bottleneck": _bottlenecks,
}


def _canonical(call: Call, options: WeightedOptions) -> Expr:
    weights = options.weights or (1.0,) * len(call.args)
    return add(*(Scale(w, arg) for w, arg in zip(weights, call.args, strict=True)))


@linear(
    "cat",
    "Exact weighted sum as one adapter, by laying tensors side by side.",
    paper="arXiv:2410.13025",
    join=join,
    options=WeightedOptions,
    check=check_weights,
    canonical=_canonical,
)
def cat(o: WeightedOptions, n: int) -> list[float]:
    """`sum_i w_i tau_i`; a low-rank result keeps every rank: `A = [w_i s_i A_i]` stacked, `B = [B_i]` side by side."""
    return weights(o, n)
