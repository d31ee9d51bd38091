"""Folding a composition into the base's own weights, one tensor at a time: no adapter is left, and no choice either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compose.expr import Expr, normalize, parse
from compose.kind import KindError
from compose.merge import Workshop, without_merges
from compose.parameter_space.effect import Effect, effect_of
from compose.parameter_space.job import Member
from compose.slot import compute_dtype
from compose.weights import bias_of


@dataclass(frozen=True)
class Folded:
    """A tensor of the base with the composition in it.

    ``name`` is its name in the base's state dict. ``rounding`` is what writing it in ``value.dtype`` has lost of the
    change, ||cast(W + D) - (W + D)|| / ||D||: near 0 in float32, and not small in bfloat16, where a small change of a
    large weight falls between two numbers.
    """

    name: str
    value: Tensor
    rounding: float


@torch.no_grad()
def fold(model: PreTrainedModel, expr: Expr | str, *, dtype: torch.dtype | None = None) -> Iterator[Folded]:
    """Tensors of the base that a static composition changes, changed: W + D, c + b, and whole modules.

    Parameters
    ----------
    expr
        Over resident adapters; merges in it are carried out.
    dtype
        Of the result; default: what each layer computes in. A quantized layer gives its dequantized weight plus D,
        which is not the weight it had before it was quantized: the result is another base.

    Raises
    ------
    KindError
        An adapter that is no change of weights (bottleneck, prefix, prompt), or a bias that the base has no room for.
    """
    from compose.inject import runtime

    shop = Workshop(runtime(model))
    tree = normalize(without_merges(shop, parse(expr) if isinstance(expr, str) else expr))
    member = Member.of(tree, shop)
    for adapter in member.adapters:
        if adapter.prompt() is not None or any(adapter.prefix(path) is not None for path in adapter.paths):
            raise KindError(
                f"{adapter.kind} adapter {adapter.name!r} is no change of weights, so it cannot be folded into them"
            )
    for path in dict.fromkeys(p for a in member.adapters for p in a.paths):
        yield from _site(path, effect_of(shop, path, tree), dtype)
    yield from _heads(shop, member, dtype)


def _site(path: str, effect: Effect, dtype: torch.dtype | None) -> Iterator[Folded]:
    dtype = dtype or compute_dtype(effect.layer)
    if effect.width and (effect.node is not None or effect.gain is not None or effect.rank):
        delta = effect.dense()
        folded = _written(f"{path}.weight", effect.weight(), delta, dtype)
        yield (
            Folded(folded.name, folded.value.T.contiguous(), folded.rounding)
            if isinstance(effect.layer, Conv1D)
            else folded
        )
    if effect.bias is not None:
        bias = bias_of(effect.layer)
        if bias is None:
            raise KindError(
                f"the composition moves the bias of {path}, and this base has none there",
                hint="keep the bias adapter as it is, or leave it out: its part has no place in the base's files",
            )
        yield _written(f"{path}.bias", bias.detach().float(), effect.bias, dtype)


def _written(name: str, before: Tensor, delta: Tensor, dtype: torch.dtype) -> Folded:
    exact = before + delta
    value = exact.to(dtype)
    size = float(torch.linalg.vector_norm(delta))
    return Folded(name, value, float(torch.linalg.vector_norm(value.float() - exact)) / size if size else 0.0)


def _heads(shop: Workshop, member: Member, dtype: torch.dtype | None) -> Iterator[Folded]:
    """Modules carried whole: M_0 + sum_t c_t (M_t - M_0), or the last one of a sequence."""
    held: dict[str, list[tuple[float, Tensor]]] = {}
    for c, adapter in member.terms:
        for path in adapter.saved:
            head = adapter.head(path)
            assert head is not None  # noqa: S101 - its path is among the saved ones
            for key, value in head.state_dict().items():
                held.setdefault(f"{path}.{key}", []).append((c, value.float()))
    for name, terms in held.items():
        path, _, key = name.rpartition(".")
        own = shop.slot(path).base_layer.state_dict()[key].float()
        if member.sequential and len(terms) > 1:
            raise KindError(f"{member.expr} puts several {path} one after the other", hint="fold the last one alone")
        delta = sum((c * (value - own) for c, value in terms), torch.zeros_like(own))
        yield _written(name, own, delta, dtype or compute_dtype(shop.slot(path).base_layer))
