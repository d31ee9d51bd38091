"""Merging in parameter space. One decorated function a method; here: the average.

For a kind whose effect is linear in its weight (``averages_in_weight``: lora, dora, ia3, bias) the average of the
parameters' effects is the weighted sum of the effects, which is exact and keeps every rank; for the others
(bottleneck, prefix, prompt) the tensors themselves are averaged, which needs one config.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from compose.kind import Adapter, KindError


def average_tensors(adapters: Sequence[Adapter], weights: Sequence[float], *, name: str) -> Adapter:
    """A new adapter with theta = sum_i w_i theta_i (model soups, arXiv:2203.05482; AdaMix, arXiv:2205.12410).

    Raises
    ------
    KindError
        If kinds or configs differ: their tensors do not correspond.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.kind != first.kind or other.config != first.config:
            raise KindError(
                f"cannot average {first.kind} {first.name!r} with {other.kind} {other.name!r}: "
                "their tensors do not correspond (another kind or another config)",
                hint="average adapters of one kind and config, or use ensemble.mean",
            )
    merged = copy.deepcopy(first)
    merged.name = name
    states = [a.state() for a in adapters]
    with torch.no_grad():
        theta: dict[str, Tensor] = {
            key: sum((w * s[key].float() for w, s in zip(weights, states, strict=True)), torch.zeros(())).to(
                value.dtype
            )
            for key, value in states[0].items()
        }
    merged.load_state(theta)
    return merged.freeze()
