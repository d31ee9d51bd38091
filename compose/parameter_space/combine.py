"""Carrying out a method on tensors read in blocks: the same steps for deltas, vectors and whole modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.parameter_space.blocks import Source, TensorSource, spans
from compose.parameter_space.method import Elementwise, Linear, Method, get_method
from compose.parameter_space.trim import all_of_it

if TYPE_CHECKING:
    from compose.parameter_space.trim import OnBlocks


def trimmed(method: Elementwise, o: Any, scope: Sequence[Sequence[Source]]) -> list[list[OnBlocks]]:
    """Trims for ``scope[member][place]``: made for each member over all places, or for each place alone."""
    trim = method.trim or all_of_it
    if method.whole(o):
        by_member = [trim(places, o) for places in scope]
        return [[at(source) for source in places] for at, places in zip(by_member, scope, strict=True)]
    return [[trim([source], o)(source) for source in places] for places in scope]


@torch.no_grad()
def at_place(
    method: Elementwise,
    o: Any,
    sources: Sequence[Source],
    trims: Sequence[OnBlocks],
    measured: Sequence[Tensor] | None = None,
) -> Tensor:
    """The merged (rows, width) of one place, block by block: peak memory is the result and what the readers hold."""
    readers = [source.reader() for source in sources]
    rows, width = sources[0].rows, sources[0].width
    out: Tensor | None = None
    for lo, hi in spans(rows, width, len(sources)):
        stack = torch.stack([trim(read(lo, hi)) for trim, read in zip(trims, readers, strict=True)])
        about = [] if measured is None or method.needs is None else [[method.needs.block(m, lo, hi) for m in measured]]
        block = method.combine(stack, o, *about)
        out = block.new_empty(rows, width) if out is None else out
        out[lo:hi] = block
    return torch.zeros(rows, width) if out is None else out


def merge_tensors(
    method: Method, o: Any, members: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Merge task vectors given as tensors by key, each as float32 of the shape of ``shapes[key]``.

    A member that lacks a key has a task vector of zero there.
    """
    if method.otherwise is not None:
        method = get_method(method.otherwise(o))
    vectors = {
        key: [m[key].float() if key in m else torch.zeros_like(like, dtype=torch.float32) for m in members]
        for key, like in shapes.items()
    }
    if isinstance(method, Linear):
        return {key: _linear(method, o, taus) for key, taus in vectors.items()}
    assert isinstance(method, Elementwise)  # noqa: S101 - narrows the type
    keys = list(vectors)
    scope = [[TensorSource(vectors[key][i]) for key in keys] for i in range(len(members))]
    trims = trimmed(method, o, scope) if keys else []
    return {
        key: at_place(method, o, [s[j] for s in scope], [t[j] for t in trims]).reshape(shapes[key].shape)
        for j, key in enumerate(keys)
    }


def _linear(method: Linear, o: Any, taus: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(taus[0])
    for c, tau in zip(coefficients(method, o, taus), taus, strict=True):
        total += c * tau
    return total


def coefficients(method: Linear, o: Any, taus: Sequence[Tensor]) -> Sequence[float]:
    """Coefficients for tensors of one place."""
    if not method.from_gram:
        return method.coefficients(o, len(taus))
    flat = torch.stack([tau.flatten().double() for tau in taus])
    return method.coefficients(o, flat @ flat.T)
