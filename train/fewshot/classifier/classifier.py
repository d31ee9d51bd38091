"""What every few-shot method ends in: a base with an adapter, and members that read it.

The artifact is a normal one (`compose.load(base, ref)` adapts the model) with two more files: `aux/fewshot.json`
(labels, members, their shares) and `aux/head.safetensors`. `FewShotClassifier.load(ref)` gives equal logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save
from torch import Tensor

import compose
from hub.errors import NotFound
from hub.store import Artifact, Store
from train.errors import DataError
from train.fewshot.classifier.members import Demonstrations, Member, Reading, Views
from train.fewshot.examples import Example, Text
from train.fewshot.reading.head import Head
from train.fewshot.reading.views import View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FACTS", "HEAD", "FewShotClassifier", "Spec", "head_member", "load", "load_base"]

FACTS = "aux/fewshot.json"
HEAD = "aux/head.safetensors"
_BASES = "give a masked LM such as BERT; a T5 writes templates: --writer"
_ADAPTER = "fewshot"


class Spec(BaseModel):
    """What a classifier reads and how: `aux/fewshot.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: str
    labels: tuple[str, ...] = Field(min_length=2, max_length=999)
    members: tuple[Member, ...] = Field(min_length=1, max_length=16)
    shares: tuple[float, ...]  # of the members in the answer; they sum to one
    max_length: int = Field(ge=2, le=1 << 16)
    base_task: str = "masked_lm"
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        total = sum(self.shares)
        if len(self.shares) != len(self.members) or min(self.shares) < 0 or abs(total - 1) > 1e-4:
            raise ValueError(f"{len(self.members)} members need as many shares that sum to one, not {self.shares}")
        for member in self.members:
            if member.words and len(member.words) != len(self.labels):
                raise ValueError(f"words of {len(member.words)} labels, not of {len(self.labels)}")
            if isinstance(member, Demonstrations) and len(member.said) != len(self.labels):
                raise ValueError("each label needs a word for solved examples")
        return self


class FewShotClassifier:
    """Texts to label logits; a text is a string, a pair of strings or an `Example`.

    Parameters
    ----------
    model
        The base; the classifier's adapter is resident as `fewshot`.
    spec
        What is read.
    tensors
        One mapping a member: the head of a `Views`, else empty.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, spec: Spec, tensors: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.model, self.spec, self.tensors = model, spec, tuple(tensors)
        self.reading = Reading(model, tokenizer, spec.labels, spec.max_length, spec.precision, _ADAPTER)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.spec.labels

    def logits(self, texts: Sequence[Text]) -> Tensor:
        """(N, C) logits; of several members, the mean of their log probabilities by their shares."""
        examples = [Example.of(text) for text in texts]
        pairs = list(zip(self.spec.members, self.tensors, strict=True))
        if len(pairs) == 1:
            return pairs[0][0].logits(self.reading, examples, pairs[0][1])
        said = [member.logits(self.reading, examples, tensors).log_softmax(-1) for member, tensors in pairs]
        return torch.einsum("m,mnc->nc", torch.tensor(self.spec.shares), torch.stack(said))

    def predict_proba(self, texts: Sequence[Text]) -> Tensor:
        """(N, C) probabilities of the labels, in their order."""
        return self.logits(texts).softmax(-1)

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """The most likely label of each text."""
        return [self.labels[i] for i in self.logits(texts).argmax(1).tolist()]

    # -- on disk ---------------------------------------------------------------------------------------------------

    def write(self, directory: Path) -> None:
        """Write the two files that make the adapter a classifier."""
        (directory / "aux").mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.spec.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (directory / FACTS).write_text(text + "\n", encoding="utf-8")
        named = {f"{m}.{name}": t.contiguous() for m, own in enumerate(self.tensors) for name, t in own.items()}
        (directory / HEAD).write_bytes(save(named))

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
        spec, tensors = _files(artifact)
        model = load_base(base or spec.base)
        compose.attach(model, _ADAPTER, artifact)
        return cls(model, compose.tokenizer(base or spec.base), spec, tensors)


def load(ref: str | Artifact, *, base: str | None = None, store: Store | None = None) -> FewShotClassifier:
    """A classifier out of the store: see `FewShotClassifier.load`."""
    return FewShotClassifier.load(ref, base=base, store=store)


def _files(artifact: Artifact) -> tuple[Spec, list[dict[str, Tensor]]]:
    """Facts and tensors of an artifact, checked against each other."""
    hint = f"hub verify {artifact.ref}"
    try:
        spec = Spec.model_validate_json(artifact.file(FACTS).read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not UTF-8"
        raise DataError(f"{FACTS} of {artifact.ref} is malformed: {why}", hint=hint) from error
    try:
        if HEAD not in artifact.files:
            raise ValueError("it is not there")
        named = read_tensors(artifact.file(HEAD).read_bytes())
        tensors = [
            {name.removeprefix(f"{m}."): tensor for name, tensor in named.items() if name.startswith(f"{m}.")}
            for m in range(len(spec.members))
        ]
        for member, own in zip(spec.members, tensors, strict=True):
            if isinstance(member, Views):
                member.head(own, len(spec.labels))
    except (ValueError, SafetensorError) as error:
        raise DataError(f"{HEAD} of {artifact.ref}: {error}", hint=hint) from error
    return spec, tensors


def head_member(
    views: Sequence[View], head: Head, words: Sequence[Sequence[int]], *, adapted: bool = True
) -> tuple[Views, dict[str, Tensor]]:
    """A head over views as a member, and its tensors."""
    read = tuple((view.template, view.pool) for view in views)
    spoken = tuple(tuple(ids) for ids in words) if head.strength else ()
    member = Views(adapted=adapted, views=read, words=spoken, strength=head.strength)
    return member, {"offset": head.offset, **{f"view.{i}": w for i, w in enumerate(head.weights) if len(w)}}


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
