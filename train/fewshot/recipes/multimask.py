"""PET's training for label words of several tokens (arXiv:2009.07118); `masks` has its loss and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from train.fewshot.classifier.members import Masks
from train.fewshot.job import FewShotResult, Job
from train.fewshot.prompts.filled import encode, to_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.reading.masks import hinge, sequence_ce
from train.fewshot.reading.reader import MaskReader
from train.fewshot.tuning.prompt_tuning import tune
from train.method import Method

__all__ = ["Hinge", "MultiMaskModel", "multi_mask"]


class MultiMaskModel(nn.Module):
    """Label logits -CE_y (B, C) of prompts with a run of masks."""

    def __init__(self, reader: MaskReader, words: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.reader, self.words = reader, words

    def forward(self, mask_at: Tensor, row: Tensor | None = None, **inputs: Tensor) -> Any:
        """`.logits` (B, C)."""
        return SimpleNamespace(logits=-sequence_ce(self.reader(mask_at, row, **inputs).logits, self.words))


class Hinge(Method):
    """The multi-mask loss, where a model's logits are -CE."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum over rows."""
        return hinge(-model(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"])


def multi_mask(job: Job, steps: int = 40) -> FewShotResult:
    """Train with the words whole, however many tokens they have; `masks.decode` predicts."""
    words = job.verbalizer().tokens(job.tokenizer)
    template = Template.parse(job.patterns[0]).with_masks(max(map(len, words)))
    rows = [encode(template, e, job.tokenizer, max_length=job.max_length) for e in job.examples]
    data = to_dataset(rows, [e.label for e in job.examples], job.tokenizer, job.labels)
    tuned = tune(
        job.model,
        lambda reader: MultiMaskModel(reader, words),
        data,
        job.config(job.steps(steps, data, blocks=3)),
        name="fewshot",
        method_of=lambda _reader: Hinge(),
    )
    member = Masks(template=job.patterns[0], words=tuple(tuple(ids) for ids in words))
    facts = {"templates": [template.format()], "tokens": [len(w) for w in words]}
    return FewShotResult(job.classifier((member, {})), tuned.adapter, "multi-mask", tuned.config, tuned.result, facts)
