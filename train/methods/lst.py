"""Ladder side-tuning."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

import compose
from compose.kind.adapter import Adapter
from compose.kinds.ladder import Ladder
from compose.runtime.model_runtime import runtime
from train.data.batches import Dataset
from train.method import Method, MethodOptions, register
from train.steps.objective import forward, loss_sum

log = logging.getLogger(__name__)
_ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


class LstOptions(MethodOptions):
    """Where the side network starts."""

    fisher_rows: int = Field(
        32, ge=0, description="training rows that say which of the model's weights to copy; 0: start from fresh values"
    )


@register("lst")
class LadderSideTuning(Method):
    """A small side network of width d / 8 that reads the frozen model's hidden states through learned gates.

    `s_i = Block_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i)`, `mu = sigmoid(a / T)`, a = 0 at first, T = 0.1. No gradient
    enters the model, so its activations are not kept: that is what saves memory. The blocks start as the model's own,
    cut down to the rows and columns of highest Fisher information (the squared gradient of the loss), the D_i choosing
    the same dimensions. Stores the side network.
    """

    kind = "ladder"
    paper = "arXiv:2206.06522"
    noise = False  # it could only blur what the ladder sees
    Options = LstOptions
    own: LstOptions

    def warm(self, model: PreTrainedModel, learner: Adapter, data: Dataset) -> None:
        """Cut the blocks out of the model's."""
        assert isinstance(learner, Ladder)  # noqa: S101 - narrows the type
        if not self.own.fisher_rows:
            return
        blocks = [_weights(model, layer) for layer in learner.rungs]
        if any(weight is None for block in blocks for weight in block.values()):
            log.warning("lst: this base's blocks cannot be cut (fused, quantized or gated): the ladder starts fresh")
            return
        plain = [{role: weight for role, weight in block.items() if weight is not None} for block in blocks]
        compose.activate(model, None)
        with _squared_gradients([weight for block in plain for weight in block.values()]) as sums:
            for row in range(min(self.own.fisher_rows, len(data))):
                batch = {name: value.to(model.device) for name, value in data.batch(torch.tensor([row])).items()}
                loss_sum(data.task, forward(model, batch, data.task), batch["labels"]).backward()  # type: ignore[no-untyped-call]
        compose.activate(model, self.adapter_name)
        with torch.no_grad():
            _cut(learner, plain, [{role: sums[weight] for role, weight in block.items()} for block in plain])


def _weights(model: PreTrainedModel, layer: int) -> dict[str, nn.Parameter | None]:
    """The six matrices of a block by role, where they are plain linear weights."""
    weights: dict[str, nn.Parameter | None] = {}
    for role in _ROLES:
        sites = [site for site in runtime(model).sites.with_role(role) if site.layer == layer and site.stack == ""]
        module = model.get_submodule(sites[0].path) if len(sites) == 1 else None
        weight = module.weight if isinstance(module, nn.Linear) else None
        weights[role] = weight if isinstance(weight, nn.Parameter) and weight.dtype.is_floating_point else None
    return weights


class Sums(NamedTuple):
    """Of a weight's squared gradients: over its rows, (d_in,), and over its columns, (d_out,)."""

    rows: Tensor
    columns: Tensor


@contextmanager
def _squared_gradients(weights: list[nn.Parameter]) -> Iterator[dict[nn.Parameter, Sums]]:
    """Let frozen weights have gradients, of which only these sums are kept: one whole gradient exists at a time."""
    sums = {w: Sums(*(torch.zeros(size, device=w.device) for size in reversed(w.shape))) for w in weights}

    def take(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter) and weight.grad is not None  # noqa: S101 - narrows the type
        squares = weight.grad.float().square()
        sums[weight].rows.add_(squares.sum(0))
        sums[weight].columns.add_(squares.sum(1))
        weight.grad = None

    hooks = [
        weight.requires_grad_(True).register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        for weight in weights
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _cut(ladder: Ladder, blocks: list[dict[str, nn.Parameter]], fisher: list[dict[str, Sums]]) -> None:
    """Copy the rows and columns that matter; grouped queries give the queries of their first group."""
    # The same m of the d dimensions in all blocks: what one writes into the stream, the next reads.
    m = len(ladder.at("", "in"))
    reads = sum(f[role].rows for f in fisher for role in ("attn.q", "attn.k", "attn.v", "mlp.up"))
    writes = sum(f[role].columns for f in fisher for role in ("attn.o", "mlp.down"))
    dimensions = _top(torch.as_tensor(reads + writes), m)
    # The ladder reads the model's states at these dimensions alone: rows of the identity.
    choose = torch.zeros_like(ladder.at("", "in")).scatter_(1, dimensions[:, None], 1.0)
    ladder.at("", "in").copy_(choose)
    for rung, block, f in zip(ladder.rungs, blocks, fisher, strict=True):
        # Inside a block, queries and keys must agree in their dimensions, and so must values and what o reads.
        keys, values = (_top(f[role].columns, m) for role in ("attn.k", "attn.v"))
        inner = _top(f["mlp.up"].columns + f["mlp.down"].rows, 4 * m)
        parts = [block["attn.q"][keys], block["attn.k"][keys], block["attn.v"][values]]
        ladder.at("", f"{rung}.in").copy_(choose)
        _put(ladder.at("", f"{rung}.qkv"), torch.cat([_rows(part[:, dimensions], m) for part in parts]))
        _put(ladder.at("", f"{rung}.o"), block["attn.o"][dimensions][:, values])
        _put(ladder.at("", f"{rung}.up"), block["mlp.up"][inner][:, dimensions])
        _put(ladder.at("", f"{rung}.down"), block["mlp.down"][dimensions][:, inner])


def _top(importance: Tensor, count: int) -> Tensor:
    """Where the largest values are, in their own order."""
    return importance.topk(min(count, len(importance))).indices.sort().values


def _rows(part: Tensor, count: int) -> Tensor:
    return torch.cat([part, part.new_zeros(count - len(part), part.shape[1])])


def _put(target: Tensor, part: Tensor) -> None:
    """Write a part that may be smaller than its place (a model with few key dimensions); the rest is zero."""
    target.zero_()
    target[: part.shape[0], : part.shape[1]] = part
