"""What a classifier is made of: members that read a text each in their own way, and the share each has in the answer.

    log p(y | x) = sum_m share_m log_softmax(logits_m(x))_y + const

A member is told by JSON (`aux/fewshot.json`) and, for a head, by tensors (`aux/head.safetensors`), so an artifact is
read exactly as its training measured it: views with a head, a template before solved examples, or a run of masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import compose
from train.data.batches import Dataset
from train.fewshot.examples import Example
from train.fewshot.prompts.demonstrations import demonstrated
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.reading.head import Head
from train.fewshot.reading.masks import Order, decode
from train.fewshot.reading.match import match, pairs
from train.fewshot.reading.reader import MaskReader
from train.fewshot.reading.views import Features, Pool, View, extract, view_dataset
from train.fewshot.tuning.prompt_tuning import scores_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Demonstrations", "Masks", "Member", "Reading", "Views"]

Words: TypeAlias = tuple[tuple[Annotated[int, Field(ge=0)], ...], ...]


@dataclass(frozen=True)
class Reading:
    """A base, its tokenizer, and how texts are read: what every member needs.

    `adapter` is the name under which the classifier's adapter is resident.
    """

    model: PreTrainedModel
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int
    precision: Literal["fp32", "bf16"]
    adapter: str = "fewshot"

    def switch(self, adapted: bool) -> None:
        """Make the adapter, or the bare base, active."""
        compose.activate(self.model, self.adapter if adapted else None)

    def features(self, views: Sequence[View], words: Sequence[Sequence[int]], examples: Sequence[Example]) -> Features:
        """What the views see, under whatever is active."""
        read = [view for view in views if view.pool != "match"]
        data = {
            t: view_dataset(t, examples, self.tokenizer, self.labels, max_length=self.max_length)
            for t in dict.fromkeys(view.template for view in read)
        }
        features = Features((), torch.zeros(len(examples), 0, max(len(words), 1)))
        reader = MaskReader(self.model)
        try:
            if read:
                features = extract(reader, read, data, words, precision=self.precision)
            if len(read) == len(views):
                return features
            agreed = match(
                reader, pairs(examples), self.tokenizer, max_length=self.max_length, precision=self.precision
            )
        finally:
            reader.close()
        states = iter(features.states)
        return Features(tuple(agreed if v.pool == "match" else next(states) for v in views), features.prior)

    def likeness(self, examples: Sequence[Example], pool: Sequence[Example]) -> Tensor:
        """(N, P) cosines of the bare base's mean states; the adapter is inactive then."""
        self.switch(False)
        return self.features([View()], (), examples).states[0] @ self.features([View()], (), pool).states[0].T


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Views(_Facts):
    """A head over views; without weights it is the label words' own answer."""

    kind: Literal["views"] = "views"
    adapted: bool = True  # whether the adapter is active; without it the bare base is read
    views: tuple[tuple[str | None, Pool], ...] = Field(min_length=1, max_length=64)  # (template, pool)
    words: Words = ()  # token ids that speak for each label
    strength: float = 0.0

    def shown(self) -> tuple[View, ...]:
        """The views."""
        return tuple(View(template, pool) for template, pool in self.views)

    def head(self, tensors: Mapping[str, Tensor], classes: int) -> Head:
        """The head of these tensors.

        Raises
        ------
        ValueError
            They do not fit the labels or the views.
        """
        weights = tuple(tensors.get(f"view.{i}", torch.empty(0, classes)) for i in range(len(self.views)))
        offset = tensors.get("offset", torch.empty(0))
        if offset.shape != (classes,) or any(w.dim() != 2 or w.shape[1] != classes for w in weights):
            raise ValueError(f"the head does not fit {classes} labels")
        return Head(weights, offset, self.strength)

    def logits(self, reading: Reading, examples: Sequence[Example], tensors: Mapping[str, Tensor]) -> Tensor:
        """(N, C) logits."""
        reading.switch(self.adapted)
        head = self.head(tensors, len(reading.labels))
        return head(reading.features(self.shown(), self.words if head.strength else (), examples))


class Demonstrations(_Facts):
    """A template followed by solved examples, one a label; logits are averaged over `samples` draws.

    The solved examples are training rows: the artifact holds their texts. What is drawn for a text depends on the text
    and the seed alone, not on what it is predicted together with.
    """

    kind: Literal["demonstrations"] = "demonstrations"
    template: str
    words: Words
    said: tuple[str, ...]  # the word of each label in a solved example
    rows: tuple[tuple[str, str | None, str], ...]  # text, second text, label
    samples: int = Field(ge=1, le=64)
    seed: int = Field(ge=0)

    def prompts(self, reading: Reading, examples: Sequence[Example], samples: int) -> Dataset:
        """Each example `samples` times, every time with other demonstrations; the bare base is active then."""
        pool = [Example(text, text2, label) for text, text2, label in self.rows]
        said = dict(zip(reading.labels, self.said, strict=True))
        options: dict[str, Any] = {"samples": samples, "seed": self.seed, "max_length": 2 * reading.max_length}
        likeness = reading.likeness(examples, pool)
        template = Template.parse(self.template)
        return demonstrated(
            template, examples, pool, said, reading.tokenizer, reading.labels, likeness=likeness, **options
        )

    def logits(self, reading: Reading, examples: Sequence[Example], tensors: Mapping[str, Tensor]) -> Tensor:
        """(N, C) logits."""
        data = self.prompts(reading, [Example(e.text, e.text2) for e in examples], self.samples)
        reading.switch(True)
        scores = scores_of(reading.model, WordScores(self.words), data, precision=reading.precision)
        return scores.view(len(examples), self.samples, -1).mean(1)


class Masks(_Facts):
    """Words of several tokens in a run of masks, scored as `masks.decode` does."""

    kind: Literal["masks"] = "masks"
    template: str
    words: Words
    order: Order = "max-first"

    def logits(self, reading: Reading, examples: Sequence[Example], tensors: Mapping[str, Tensor]) -> Tensor:
        """(N, C) sums of log p."""
        reading.switch(True)
        reader = MaskReader(reading.model)
        options: dict[str, Any] = {"order": self.order, "max_length": reading.max_length}
        options["precision"] = reading.precision
        try:
            return decode(reader, Template.parse(self.template), examples, reading.tokenizer, self.words, **options)
        finally:
            reader.close()


Member: TypeAlias = Annotated[Views | Demonstrations | Masks, Field(discriminator="kind")]
