"""From a dense delta to a sparse one: which weights stay, and the adapter that stores only them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

import compose
from compose.kind.adapter import Adapter
from compose.kinds.sparse import SparseShift
from train.config import TrainConfig
from train.learner.reparametrize import attribute, attributes
from train.steps.optimizer import learning_rate

__all__ = ["largest", "places", "start_again", "to_sparse"]

Place = tuple[str, str]  # path and name of a parameter
_NAMES = ("weight", "bias")


def places(adapter: Adapter) -> list[Place]:
    """The parameters of the base that a dense adapter moves."""
    return list(attributes(adapter, *_NAMES))


def largest(values: Mapping[Place, Tensor], density: float) -> dict[Place, Tensor]:
    """Masks of the K entries of largest magnitude over all tensors together, K = density of all; never more than K."""
    sizes = [value.numel() for value in values.values()]
    count = _count(values, density)
    everything = torch.cat([value.detach().abs().flatten() for value in values.values()])
    mask = torch.zeros_like(everything, dtype=torch.bool)
    mask[everything.topk(count).indices] = True
    parts = torch.split(mask, sizes)
    return {place: part.view_as(value) for (place, value), part in zip(values.items(), parts, strict=True)}


def _count(values: Mapping[Place, Tensor], density: float) -> int:
    """How many entries `density` of all are, one at least."""
    return max(1, int(density * sum(value.numel() for value in values.values())))


def start_again(
    optimizer: Optimizer, parameters: list[nn.Parameter], config: TrainConfig, step: int, total: int, scale: float = 1.0
) -> None:
    """Train these parameters from step `step` of `total` on as in a run of their own, whose rate is `scale` times ours.

    Old momentum must not move what starts anew, and the rate stands at its peak again: what is left of the fall is as
    much larger as the rate had fallen (of a line: the same line, from the top). Groups of other parameters, a head's,
    have the schedule again, and their own rate.
    """
    again = {id(parameter) for parameter in parameters}
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
    if not round(config.warmup * total) <= step < total:
        return  # the rate is still rising, or there is no second phase
    for group in optimizer.param_groups:
        own = scale if any(id(parameter) in again for parameter in group["params"]) else 1.0
        group["lr_scale"] = group.get("lr_scale", 1.0) * own * config.lr / learning_rate(config, step, total)


def to_sparse(model: PreTrainedModel, dense: Adapter, density: float, name: str) -> Adapter:
    """A sparse adapter with the entries of a dense one that are not zero, K at most, resident under `name`."""
    options = {**dense.config.model_dump(), "density": density}
    sparse = compose.create(model, "sparse", options, name=name)
    assert isinstance(sparse, SparseShift)  # noqa: S101 - narrows the type
    moved = {place: getattr(dense, attribute(*place)).detach() for place in places(dense)}
    if sum(int((delta != 0).sum()) for delta in moved.values()) > _count(moved, density):
        masks = largest(moved, density)  # a run that ended before it chose
        moved = {place: delta * masks[place] for place, delta in moved.items()}
    for (path, key), delta in moved.items():
        at = delta.flatten().nonzero().flatten()
        sparse.choose(path, key, at, delta.flatten()[at])
    for path in dense.saved:
        ours, theirs = sparse.head(path), dense.head(path)
        if ours is not None and theirs is not None:
            ours.load_state_dict(theirs.state_dict())
    return sparse
