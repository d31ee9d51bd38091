"""Refining: a LoRA on the upper blocks learns to make the views' vectors tell the classes apart.

The lower blocks run once (see replay); each training row is one view of one example and is read by that view's own
head, which stays fixed. Afterwards the joint head is fitted anew on the vectors that the adapted model gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import compose
from compose.kind.adapter import Adapter
from train.config import TrainConfig
from train.fewshot.examples import Example
from train.fewshot.reading.head import fit_head
from train.fewshot.reading.reader import MaskReader, inputs_of
from train.fewshot.reading.replay import Replay, blocks_of
from train.fewshot.reading.views import Features, View, ViewModel, joined, view_dataset
from train.fewshot.tuning.distil import Distillation
from train.loop import fit
from train.result import FitResult
from train.steps.evaluate import amp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RefinedAdapter", "adapter_options", "refine", "upper_blocks"]


@dataclass(frozen=True)
class RefinedAdapter:
    """A trained adapter, active in its model, and how training went."""

    adapter: Adapter
    result: FitResult


def upper_blocks(model: PreTrainedModel, count: int) -> tuple[int, int]:
    """First and one-past-last number of the `count` upper blocks (all of them, where they are not in one stack)."""
    blocks = blocks_of(model)
    depth = len(blocks) if blocks is not None else 0
    return max(0, depth - count), depth


def adapter_options(model: PreTrainedModel, blocks: int, r: int = 8) -> dict[str, Any]:
    """A LoRA on every linear layer of the upper blocks."""
    first, last = upper_blocks(model, blocks)
    layers = {"layers": tuple(range(first, last))} if last else {}
    return {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", **layers}


def refine(
    model: PreTrainedModel,
    tokenizer: Any,
    views: Sequence[View],
    examples: Sequence[Example],
    features: Features,
    labels: Sequence[str],
    config: TrainConfig,
    *,
    name: str,
    blocks: int = 3,
    max_length: int = 128,
    soft: Tensor | None = None,
) -> RefinedAdapter:
    """Train an adapter called `name` on `examples`, whose frozen `features` are known; it ends active.

    With `soft` (N, C), a teacher's logits, it learns from these (see `tuning.distil`) and not from the labels.

    Raises
    ------
    NonFiniteLoss
        See `train.loop.fit`.
    """
    index = {label: i for i, label in enumerate(labels)}
    answers = torch.tensor([index[str(e.label)] for e in examples]) if soft is None else soft.softmax(-1)
    none = torch.zeros(len(examples), 0, len(labels))
    heads: list[tuple[Tensor, Tensor]] = []
    for state in features.states:
        head = fit_head(Features((state,), none), answers, len(labels), 1.0, prior=False)
        heads.append((head.weights[0], head.offset))
    compose.activate(model, None)
    replay = Replay(model, upper_blocks(model, blocks)[0])
    reader = MaskReader(model, replay)
    try:
        data = [view_dataset(v.template, examples, tokenizer, labels, max_length=max_length) for v in views]
        reader.eval()
        with amp(model.device, config.precision):
            kept = [replay.record(d, lambda batch: reader(**inputs_of(batch))) for d in data]
        adapter = compose.create(model, "lora", adapter_options(model, blocks), name=name, seed=config.seed)
        compose.activate(model, name)
        rows = joined(data, kept)
        if soft is not None:
            rows = dataclasses.replace(rows, columns={**rows.columns, "soft": soft.repeat(len(views), 1)})
        method = Distillation() if soft is not None else None
        with replay.on():
            result = fit(ViewModel(reader, views, heads), adapter, rows, None, config, method=method)
    finally:
        reader.close()
    model.eval()
    return RefinedAdapter(adapter.freeze(), result)
