"""What every few-shot method ends in: a base with an adapter, and members that read it.

The artifact is a normal one (`compose.load(base, ref)` adapts the model) with two more files: `aux/fewshot.json`
(labels, members, their shares) and `aux/head.safetensors`. `FewShotClassifier.load(ref)` gives equal logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save
from torch import Tensor

import compose
from compose.base.at_hand import at_hand
from compose.base.model import name_of
from compose.errors import KindError
from compose.reader import LinearHead
from compose.runtime.model_runtime import runtime
from hub.errors import NotFound
from hub.store import Artifact, Store
from train.errors import DataError
from train.fewshot.classifier.members import Demonstrations, Member, Reading, Views
from train.fewshot.examples import Example, Text
from train.fewshot.reading.head import Head, average
from train.fewshot.reading.views import View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FACTS", "HEAD", "READER", "FewShotClassifier", "Spec", "head_member", "load", "load_base", "on_base"]

FACTS = "aux/fewshot.json"
HEAD = "aux/head.safetensors"
_BASES = "give a masked LM such as BERT; a T5 writes templates: --writer"
READER = "few_shot"  # the name of `compose.readers.few_shot`, in manifests
_ADAPTER = "fewshot"
_WINDOW = 512  # texts that are read between two reports of progress


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
    columns: tuple[str, str | None] = ("text", None)  # of its rows: the text, and the second one of a pair
    separator: str | None = None  # of several labels in one text

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
    name
        Under which its adapter is resident on the model.
    """

    task = "classification"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        spec: Spec,
        tensors: Sequence[Mapping[str, Tensor]],
        *,
        name: str = _ADAPTER,
    ) -> None:
        self.model, self.spec, self.tensors = model, spec, tuple(tensors)
        self.reading = Reading(model, tokenizer, spec.labels, spec.max_length, spec.precision, name)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.spec.labels

    def logits(self, texts: Sequence[Text]) -> Tensor:
        """(N, C) logits; of several members, the mean of their log probabilities by their shares."""
        examples = self._examples(texts)
        if not examples:
            return torch.zeros(0, len(self.labels))
        pairs = list(zip(self.spec.members, self.tensors, strict=True))
        if len(pairs) == 1:
            return pairs[0][0].logits(self.reading, examples, pairs[0][1])
        said = [member.logits(self.reading, examples, tensors).log_softmax(-1) for member, tensors in pairs]
        return torch.einsum("m,mnc->nc", torch.tensor(self.spec.shares), torch.stack(said))

    def scores(self, texts: Sequence[Text], *, advance: Callable[[int], None] = lambda _rows: None) -> Tensor:
        """(N, C) probabilities of the labels; `advance` is told how many texts more have been read.

        Raises
        ------
        DataError
            Something that is no text, an empty one (by its number), or one text where a pair is read.
        """
        parts = []
        for start in range(0, len(texts), _WINDOW):
            part = texts[start : start + _WINDOW]
            parts.append(self.logits(part).softmax(-1))
            advance(len(part))
        return torch.cat(parts) if parts else torch.zeros(0, len(self.labels))

    def chosen(self, scores: Tensor) -> tuple[str, ...]:
        """The labels that scores (C,) stand for: the most likely one."""
        return (self.labels[int(scores.argmax())],)

    def predict_proba(self, texts: Sequence[Text]) -> Tensor:
        """(N, C) probabilities of the labels, in their order. See `scores`."""
        return self.scores(texts)

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """The most likely label of each text."""
        return [self.chosen(row)[0] for row in self.scores(texts)]

    def _examples(self, texts: Sequence[Text]) -> list[Example]:
        """Texts, pairs or rows as examples, each with what it is to be read by."""
        if isinstance(texts, str):
            raise DataError("a single text was given", hint=f"a list of them: predict([{texts[:20]!r}])")
        examples = [Example.of(text, self.spec.columns) for text in texts]
        for number, example in enumerate(examples, 1):
            if not example.text.strip() or (example.text2 is not None and not example.text2.strip()):
                raise DataError(f"text {number} of {len(examples)} is empty", hint="leave it out")
            if (example.text2 is None) != (self.spec.columns[1] is None):
                told = "one text, and pairs are read" if example.text2 is None else "a pair, and single texts are read"
                raise DataError(f"text {number} of {len(examples)} is {told}", hint="as in training")
        return examples

    def linear_head(self) -> LinearHead:
        """One head on unit mean states with the same probabilities: members' heads by their shares.

        log p is a sum of shares times logits, up to what all labels have in common.

        Raises
        ------
        KindError
            A member that reads something else than the plain text's mean state, or another state of the model.
        """
        read = {view for m in self.spec.members for view in (m.views if isinstance(m, Views) else ((m.kind, ""),))}
        states = {isinstance(m, Views) and m.adapted for m in self.spec.members}
        spoken = any(isinstance(m, Views) and m.strength for m in self.spec.members)
        if read != {(None, "mean")} or len(states) > 1 or spoken:
            told = ", ".join(sorted({f"{pool} of {template!r}" if template else pool for template, pool in read}))
            told += ", label words" if spoken else ""
            raise KindError(
                f"it is no single head on plain texts: it reads {told}, with and without its adapter"
                if len(states) > 1
                else f"it is no single head on plain texts: it reads {told}",
                hint="serve it: hub serve BASE, POST /v1/classify; --method fine-tune learns one head",
            )
        heads = [
            m.head(own, len(self.labels))
            for m, own in zip(self.spec.members, self.tensors, strict=True)
            if isinstance(m, Views)
        ]
        head = average(heads, self.spec.shares)
        tolerance = 1e-4 if self.spec.precision == "fp32" else 0.05
        return LinearHead(self.model, head.weights[0], head.offset, states.pop(), self.spec.max_length, tolerance)

    @property
    def bytes(self) -> int:
        """Of the heads and the adapter."""
        adapter = runtime(self.model).adapters[self.reading.adapter]
        tensors = [*adapter.parameters(), *(t for own in self.tensors for t in own.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def close(self) -> None:
        """Let the adapter go; the model is its owner's."""
        compose.activate(self.model, None)
        compose.detach(self.model, self.reading.adapter)

    # -- on disk ---------------------------------------------------------------------------------------------------

    def write(self, directory: Path) -> None:
        """Write the two files that make the adapter a classifier."""
        (directory / "aux").mkdir(parents=True, exist_ok=True)
        # Bases are named, and never by a path of this machine.
        named = self.spec.model_copy(update={"base": name_of(self.model)})
        text = json.dumps(named.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (directory / FACTS).write_text(text + "\n", encoding="utf-8")
        tensors = {f"{m}.{name}": t.contiguous() for m, own in enumerate(self.tensors) for name, t in own.items()}
        (directory / HEAD).write_bytes(save(tensors))

    @classmethod
    def load(cls, ref: str | Artifact, *, base: str | None = None, store: Store | None = None) -> FewShotClassifier:
        """From the store, on a base of its own: the one it was made for, where that is now, or `base`.

        Raises
        ------
        NotFound
            The artifact is not a few-shot classifier.
        HubError
            No such artifact; it was made for another base; its files do not fit each other.
        """
        artifact = ref if isinstance(ref, Artifact) else (store or Store()).get(ref)
        spec, _ = _files(artifact)
        made_for = artifact.manifest.base
        where = base or (spec.base if made_for is None else at_hand(made_for))
        return on_base(artifact, load_base(where), compose.tokenizer(where))


def load(ref: str | Artifact, *, base: str | None = None, store: Store | None = None) -> FewShotClassifier:
    """A classifier out of the store: see `FewShotClassifier.load`."""
    return FewShotClassifier.load(ref, base=base, store=store)


def on_base(artifact: Artifact, model: PreTrainedModel, tokenizer: Any, *, name: str = _ADAPTER) -> FewShotClassifier:
    """A classifier on a base that is there already, its adapter resident under `name`. Raises as `load`."""
    spec, tensors = _files(artifact)
    compose.attach(model, name, artifact)
    return FewShotClassifier(model, tokenizer, spec, tensors, name=name)


def _files(artifact: Artifact) -> tuple[Spec, list[dict[str, Tensor]]]:
    """Facts and tensors of an artifact, checked against each other."""
    if FACTS not in artifact.files:
        hint = "hub few-shot DATA --publish NS/NAME makes one"
        raise NotFound(f"{artifact.ref} is no few-shot classifier: it lacks {FACTS}", ref=artifact.ref, hint=hint)
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


def load_base(base: str | Path, **options: Any) -> PreTrainedModel:
    """The base in float32, with the language-modelling head it was saved with; `options` are `compose.load`'s.

    Raises
    ------
    DataError
        It is an encoder-decoder.
    """
    model = compose.load(base, **{"dtype": "fp32", **options})
    if model.config.is_encoder_decoder:
        raise DataError(f"{base} is an encoder-decoder; few-shot classifiers read one stack of layers", hint=_BASES)
    return model
