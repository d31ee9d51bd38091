"""What every few-shot method ends in: a base with an adapter, the views it reads, and a linear head over them.

The artifact is a normal one (`compose.load(base, ref)` adapts the model) with two more files: `aux/fewshot.json`
(views, label words, labels) and `aux/head.safetensors`. `FewShotClassifier.load(ref)` gives equal logits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

import compose
from hub.errors import NotFound
from hub.store import Artifact, Store
from train.errors import DataError
from train.fewshot.examples import Example
from train.fewshot.head import Head
from train.fewshot.reader import MaskReader
from train.fewshot.replay import Replay
from train.fewshot.views import Features, View, extract, view_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FACTS", "HEAD", "FewShotClassifier", "Spec"]

FACTS = "aux/fewshot.json"
HEAD = "aux/head.safetensors"
_BASES = "give a masked LM such as BERT; a T5 writes templates: --writer"


class Spec(BaseModel):
    """What a classifier reads and how: `aux/fewshot.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: str
    labels: tuple[str, ...] = Field(min_length=2, max_length=999)
    views: tuple[tuple[str | None, str], ...] = Field(min_length=1, max_length=64)  # (template, pool)
    words: tuple[tuple[int, ...], ...] = ()  # token ids that speak for each label
    max_length: int = Field(ge=2, le=1 << 16)
    strength: float = 0.0
    base_task: str = "masked_lm"
    precision: Literal["fp32", "bf16"] = "fp32"


class FewShotClassifier:
    """Texts to label logits.

    Parameters
    ----------
    model
        The base, with the adapter active.
    spec, head
        What is read and how it is weighed.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, spec: Spec, head: Head) -> None:
        self.model, self.tokenizer, self.spec, self.head = model, tokenizer, spec, head
        self.views = tuple(View(template, pool) for template, pool in spec.views)  # type: ignore[arg-type]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.spec.labels

    def features(self, examples: Sequence[Example], replay: Replay | None = None) -> Features:
        """What the views see."""
        reader = MaskReader(self.model, replay)
        try:
            data = {
                t: view_dataset(t, examples, self.tokenizer, self.labels, max_length=self.spec.max_length)
                for t in dict.fromkeys(view.template for view in self.views)
            }
            return extract(reader, self.views, data, self.spec.words, precision=self.spec.precision)
        finally:
            reader.close()

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """(N, C) logits."""
        return self.head(self.features(examples))

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """The most likely label of each example."""
        return [self.labels[i] for i in self.logits(examples).argmax(1).tolist()]

    # -- on disk ---------------------------------------------------------------------------------------------------

    def write(self, directory: Path) -> None:
        """Write the two files that make the adapter a classifier."""
        (directory / "aux").mkdir(parents=True, exist_ok=True)
        spec = self.spec.model_copy(update={"strength": self.head.strength})
        text = json.dumps(spec.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (directory / FACTS).write_text(text + "\n", encoding="utf-8")
        tensors = {f"view.{i}": w.contiguous() for i, w in enumerate(self.head.weights) if len(w)}
        (directory / HEAD).write_bytes(save({"offset": self.head.offset.contiguous(), **tensors}))

    @classmethod
    def load(cls, ref: str | Artifact, *, base: str | None = None, store: Store | None = None) -> FewShotClassifier:
        """From the store.

        Raises
        ------
        NotFound
            The artifact is not a few-shot classifier.
        HubError
            No such artifact; it was made for another base; its files do not fit each other.
        """
        artifact = ref if isinstance(ref, Artifact) else (store or Store()).get(ref)
        if FACTS not in artifact.files:
            hint = "hub few-shot DATA --publish NS/NAME makes one"
            raise NotFound(f"{artifact.ref} is no few-shot classifier: it lacks {FACTS}", ref=artifact.ref, hint=hint)
        try:
            spec = Spec.model_validate_json(artifact.file(FACTS).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise DataError(f"{FACTS} of {artifact.ref} is malformed: {error.errors()[0]['msg']}") from error
        tensors = load(artifact.file(HEAD).read_bytes())
        model = load_base(base or spec.base)
        compose.attach(model, "fewshot", artifact)
        compose.activate(model, "fewshot")
        return cls(model, compose.tokenizer(base or spec.base), spec, _head(spec, tensors, artifact))


def load_base(base: str) -> PreTrainedModel:
    """The base in float32, with the language-modelling head it was saved with.

    Raises
    ------
    DataError
        It is an encoder-decoder.
    """
    model = compose.load(base, dtype="fp32")
    if model.config.is_encoder_decoder:
        raise DataError(f"{base} is an encoder-decoder; few-shot classifiers read one stack of layers", hint=_BASES)
    return model


def _head(spec: Spec, tensors: dict[str, Tensor], artifact: Artifact) -> Head:
    classes = len(spec.labels)
    weights = tuple(tensors.get(f"view.{i}", torch.empty(0, classes)) for i in range(len(spec.views)))
    offset = tensors.get("offset", torch.empty(0))
    if offset.shape != (classes,) or any(w.dim() != 2 or w.shape[1] != classes for w in weights):
        raise DataError(
            f"{HEAD} of {artifact.ref} does not fit its {classes} labels", hint=f"hub verify {artifact.ref}"
        )
    return Head(weights, offset, spec.strength)
