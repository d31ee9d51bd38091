"""Prompt-based fine-tuning of one adapter: a template, label words, and `train.loop.fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compose
from compose.kind.adapter import Adapter
from train.config import TrainConfig
from train.data.batches import Dataset, Ragged
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.reading.reader import MaskReader, PromptModel, inputs_of
from train.fewshot.reading.replay import Replay
from train.fewshot.tuning.refine import adapter_options, upper_blocks
from train.loop import fit
from train.many import Job, fit_many
from train.method import Method
from train.result import FitResult
from train.seeds import generator
from train.steps.evaluate import amp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TunedAdapter", "WithLM", "accuracy", "mask_tokens", "scores_of", "tune", "tune_many"]


class WithLM(Method):
    """alpha CE + (1 - alpha) MLM (PET's auxiliary loss): each step also predicts masked words of unlabelled text."""

    def __init__(
        self, reader: MaskReader, data: Dataset, tokenizer: Any, *, alpha: float = 0.9999, seed: int = 0
    ) -> None:
        super().__init__()
        self.reader, self.data, self.tokenizer, self.alpha = reader, data, tokenizer, alpha
        self.random = generator(seed, "masks")

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum over the labelled rows; the MLM term is a mean over masked words, weighed by the rows."""
        own = super().loss(model, batch, task)
        rows = torch.randint(len(self.data), (len(batch["labels"]),), generator=self.random)
        texts = self.data.batch(rows)
        ids, target = mask_tokens(texts["input_ids"], self.tokenizer, self.random, texts["attention_mask"])
        at = (target != -100).nonzero()
        if not len(at):
            return self.alpha * own
        types = {"token_type_ids": texts["token_type_ids"]} if "token_type_ids" in texts else {}
        logits = self.reader.lm(input_ids=ids, attention_mask=texts["attention_mask"], **types).logits
        lm = F.cross_entropy(logits[at[:, 0], at[:, 1]].float(), target[at[:, 0], at[:, 1]])
        return self.alpha * own + (1 - self.alpha) * lm * len(batch["labels"])


def mask_tokens(
    ids: Tensor, tokenizer: Any, random: torch.Generator, real: Tensor, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """BERT's masking (arXiv:1810.04805): of `share` of the tokens 80% become masks, 10% random words, 10% stay.

    Returns (B, T) ids and (B, T) targets, -100 where nothing is predicted. Special tokens and padding are left alone.
    """
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=random) < share) & ~special & real.bool()
    kind = torch.rand(ids.shape, generator=random)
    words = torch.randint(len(tokenizer), ids.shape, generator=random)
    masked = torch.where(chosen & (kind < 0.8), torch.full_like(ids, tokenizer.mask_token_id), ids)
    masked = torch.where(chosen & (kind >= 0.9), words, masked)
    return masked, ids.masked_fill(~chosen, -100)


@dataclass(frozen=True)
class TunedAdapter:
    """A trained adapter, frozen and active, and how it was trained."""

    adapter: Adapter
    result: FitResult
    config: TrainConfig


def tune(
    model: PreTrainedModel,
    model_of: Callable[[MaskReader], nn.Module],
    train: Dataset,
    config: TrainConfig,
    *,
    name: str,
    dev: Dataset | None = None,
    blocks: int = 3,
    method_of: Callable[[MaskReader], Method] | None = None,
) -> TunedAdapter:
    """Train a LoRA called `name` on prompts (see `prompts.prompt_dataset`); it ends active and frozen.

    Blocks below the last `blocks` run once. `model_of(reader)` gives label logits, `method_of(reader)` the loss; one
    that feeds other rows than those of `train` (`WithLM`) needs `blocks` to cover the model.
    """
    compose.activate(model, None)
    replay = Replay(model, upper_blocks(model, blocks)[0])
    reader = MaskReader(model, replay)
    try:
        reader.eval()

        def kept(data: Dataset) -> Dataset:
            with amp(model.device, config.precision):
                rows = replay.record(data, lambda batch: reader(**inputs_of(batch)))
            return replace(data, columns={**data.columns, "row": rows})

        adapter = compose.create(model, "lora", adapter_options(model, blocks), name=name, seed=config.seed)
        train, dev = kept(train), kept(dev) if dev is not None else None
        compose.activate(model, name)
        with replay.on():
            method = None if method_of is None else method_of(reader)
            result = fit(model_of(reader), adapter, train, dev, config, method=method)
    finally:
        reader.close()
    model.eval()
    return TunedAdapter(adapter.freeze(), result, config)


def tune_many(
    model: PreTrainedModel,
    scores: WordScores,
    sets: Sequence[Dataset],
    configs: Sequence[TrainConfig],
    *,
    names: Sequence[str],
    blocks: int = 3,
) -> list[Adapter]:
    """As `tune` for one adapter a dataset, all in one pass a step; they end resident, frozen and inactive."""
    compose.activate(model, None)
    replay = Replay(model, upper_blocks(model, blocks)[0])
    reader = MaskReader(model, replay)
    try:
        reader.eval()
        adapters, jobs = [], []
        for data, config, name in zip(_alike(sets), configs, names, strict=True):
            with amp(model.device, config.precision):
                rows = replay.record(data, lambda batch: reader(**inputs_of(batch)))
            adapters.append(compose.create(model, "lora", adapter_options(model, blocks), name=name, seed=config.seed))
            jobs.append(Job(adapters[-1], replace(data, columns={**data.columns, "row": rows}), config))
        with replay.on():
            fit_many(model, jobs, through=PromptModel(reader, scores))
    finally:
        reader.close()
    model.eval()
    return [adapter.freeze() for adapter in adapters]


def _alike(sets: Sequence[Dataset]) -> list[Dataset]:
    """The datasets with token types in all, if one has them: rows of all go into one pass."""
    if not any("token_type_ids" in data.columns for data in sets):
        return list(sets)
    return [
        replace(data, columns={"token_type_ids": Ragged.of([[0] * n for n in data.lengths.tolist()]), **data.columns})
        for data in sets
    ]


@torch.no_grad()
def scores_of(
    model: PreTrainedModel, scores: WordScores, data: Dataset, size: int = 64, precision: str = "fp32"
) -> Tensor:
    """(N, C) label scores of prompts under whatever adapter is active."""
    reader = MaskReader(model)
    logits = torch.zeros(len(data), len(scores.ids))
    try:
        reader.eval()
        for rows, batch in data.batches(size):
            with amp(model.device, precision):
                out = reader(**inputs_of(batch))
            logits[rows] = scores(out.logits[:, 0].float())
    finally:
        reader.close()
    return logits


def accuracy(logits: Tensor, data: Dataset) -> float:
    """Share of rows whose best label is theirs."""
    labels = torch.as_tensor(data.columns["labels"])
    return float((logits.argmax(1) == labels).double().mean())
