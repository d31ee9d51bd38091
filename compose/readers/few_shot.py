"""Classifiers that `hub few-shot` has learned: views with heads, templates, runs of masks and their shares.

`train.fewshot`, which measures with them while it learns, reads them; here they are reached by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from compose.reader import READERS, LinearHead, Reader, ReaderText
from hub.lazy import load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hub.store import Artifact


@READERS.register("few_shot")
class FewShot(Reader):
    """A mixture of members; see `train.fewshot.classifier`."""

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier
        self.task, self.labels = classifier.task, classifier.labels
        self.columns, self.separator = classifier.spec.columns, classifier.spec.separator

    @classmethod
    def open(cls, artifact: Artifact, model: PreTrainedModel, tokenizer: Any, *, name: str) -> Self:
        """Read `aux/fewshot.json` and `aux/head.safetensors`, and attach the adapter."""
        opened = load("train.fewshot.classifier.classifier:on_base")
        return cls(opened(artifact, model, tokenizer, name=name))

    def scores(self, texts: Sequence[ReaderText]) -> Tensor:
        """Probabilities, in one pass a member."""
        scores: Tensor = self.classifier.scores(texts)
        return scores

    def chosen(self, scores: Tensor) -> tuple[str, ...]:
        """The best label, or each one above its threshold."""
        labels: tuple[str, ...] = self.classifier.chosen(scores)
        return labels

    def close(self) -> None:
        """Detach the adapter."""
        self.classifier.close()

    @property
    def bytes(self) -> int:
        """Of the adapter and the heads."""
        return int(self.classifier.bytes)

    def linear_head(self) -> LinearHead:
        """The members' heads by their shares, where all of them read plain texts alike."""
        head: LinearHead = self.classifier.linear_head()
        return head

    @classmethod
    def load_base(cls, base: Any, **options: Any) -> PreTrainedModel:
        """The base with its language-modelling head; an encoder-decoder is refused."""
        model: PreTrainedModel = load("train.fewshot.classifier.classifier:load_base")(base, **options)
        return model
