"""What every few-shot method ends in: a base with an adapter, and members that read it.

The artifact is a normal one (`compose.load(base, ref)` adapts the model) with two more files: `aux/fewshot.json`
(labels, members, their shares) and `aux/head.safetensors`. `FewShotClassifier.load(ref)` gives equal logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

import compose
from compose.base.at_hand import at_hand
from compose.base.loading import model_config
from compose.base.location import locate
from compose.base.model import name_of
from compose.base.request import BaseRequest
from compose.errors import KindError
from compose.reader import LinearHead
from compose.runtime.model_runtime import runtime
from hub.store import Artifact, Store
from train.errors import DataError
from train.fewshot.classifier.members import Reading, Views
from train.fewshot.classifier.spec import FACTS, HEAD, ROWS, Spec, read_files, rows_of
from train.fewshot.examples import Example, Text
from train.fewshot.reading.head import Head, average
from train.fewshot.reading.views import View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FewShotClassifier", "head_member", "load", "load_base", "on_base"]

Precision: TypeAlias = Literal["fp32", "bf16"]
_BASES = "give a masked LM such as BERT; a T5 writes templates: --writer"
_ADAPTER = "fewshot"
_SAID: Mapping[str, Callable[[Tensor], Tensor]] = {
    "classification": lambda logits: logits.softmax(-1),
    "multi_label_classification": torch.sigmoid,
    "regression": lambda numbers: numbers,
}
_WINDOW = 512  # texts that are read between two reports of progress


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
    precision
        Of the passes, whatever it was learned in: in bf16 a probability depends, in its third digit, on what a text is
        read together with and on the machine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        spec: Spec,
        tensors: Sequence[Mapping[str, Tensor]],
        *,
        name: str = _ADAPTER,
        precision: Precision = "fp32",
    ) -> None:
        self.model, self.spec, self.tensors = model, spec, tuple(tensors)
        self.rows: Sequence[Example] = ()  # what it has learned from, where that is kept
        self.reading = Reading(model, tokenizer, spec.outputs, spec.max_length, precision, name)

    @property
    def task(self) -> str:
        """``classification``, ``multi_label_classification`` or ``regression``."""
        return self.spec.task

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.spec.labels

    def logits(self, texts: Sequence[Text]) -> Tensor:
        """(N, C) logits; of several members, the mean of their log probabilities by their shares."""
        examples = self.examples(texts)
        if not examples:
            return torch.zeros(0, len(self.spec.outputs))
        pairs = list(zip(self.spec.members, self.tensors, strict=True))
        if len(pairs) == 1:
            return pairs[0][0].logits(self.reading, examples, pairs[0][1])
        said = [member.logits(self.reading, examples, tensors).log_softmax(-1) for member, tensors in pairs]
        return torch.einsum("m,mnc->nc", torch.tensor(self.spec.shares), torch.stack(said))

    def scores(self, texts: Sequence[Text], *, advance: Callable[[int], None] = lambda _rows: None) -> Tensor:
        """(N, C) probabilities of the labels, of a regression (N, 1) numbers.

        `advance` is told how many texts more have been read.

        Raises
        ------
        DataError
            Something that is no text, an empty one (by its number), or one text where a pair is read.
        """
        parts = []
        for start in range(0, len(texts), _WINDOW):
            part = texts[start : start + _WINDOW]
            parts.append(_SAID[self.task](self.logits(part)))
            advance(len(part))
        return torch.cat(parts) if parts else torch.zeros(0, len(self.spec.outputs))

    def chosen(self, scores: Tensor) -> tuple[str, ...]:
        """The labels that scores (C,) stand for: the best one, or each from its threshold on; none of a number."""
        if self.task == "multi_label_classification":
            told = zip(self.labels, scores.tolist(), self.spec.thresholds, strict=True)
            return tuple(label for label, p, least in told if p >= least)
        return () if self.task == "regression" else (self.labels[int(scores.argmax())],)

    def predict_proba(self, texts: Sequence[Text]) -> Tensor:
        """(N, C) probabilities of the labels, in their order. See `scores`."""
        return self.scores(texts)

    def predict(self, texts: Sequence[Text]) -> list[Any]:
        """What each text is: its most likely label, a tuple of labels, or a number."""
        scores = self.scores(texts)
        if self.task == "regression":
            return scores[:, 0].tolist()
        chosen = [self.chosen(row) for row in scores]
        return chosen if self.task == "multi_label_classification" else [labels[0] for labels in chosen]

    def examples(self, texts: Sequence[Text]) -> list[Example]:
        """Texts, pairs or rows as examples. Raises DataError for one that is empty, or not what is read."""
        if isinstance(texts, str):
            raise DataError("a single text was given", hint=f"a list of them: predict([{texts[:20]!r}])")
        examples = [Example.of(text, self.spec.columns) for text in texts]
        for number, example in enumerate(examples, 1):
            if not example.text.strip() or (example.text2 is not None and not example.text2.strip()):
                raise DataError(f"text {number} of {len(examples)} is empty", hint="leave it out")
            if (example.text2 is None) != (self.spec.columns[1] is None):
                one = example.text2 is None
                told = "one text, and pairs are read" if one else "a pair, and single texts are read"
                pair = 'predict([("one", "two")]); --text2, or --pair of hub run'
                hint = pair if one else "leave the second text out"
                raise DataError(f"text {number} of {len(examples)} is {told}", hint=hint)
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
            m.head(own, len(self.spec.outputs))
            for m, own in zip(self.spec.members, self.tensors, strict=True)
            if isinstance(m, Views)
        ]
        head = average(heads, self.spec.shares)
        return LinearHead(self.model, head.weights[0], head.offset, states.pop(), self.spec.max_length)

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
        if self.rows:
            rows = [json.dumps([e.text, e.text2, e.label], ensure_ascii=False) + "\n" for e in self.rows]
            (directory / ROWS).write_text("".join(rows), encoding="utf-8")

    @classmethod
    def load(
        cls,
        ref: str | Artifact,
        *,
        base: str | None = None,
        store: Store | None = None,
        precision: Precision = "fp32",
    ) -> FewShotClassifier:
        """From the store, on a base of its own: the one it was made for, where that is now, or `base`.

        Raises
        ------
        NotFound
            The artifact is not a few-shot classifier.
        HubError
            No such artifact; it was made for another base; its files do not fit each other.
        """
        artifact = ref if isinstance(ref, Artifact) else (store or Store()).get(ref)
        spec, _ = read_files(artifact)
        made_for = artifact.manifest.base
        where = base or (spec.base if made_for is None else at_hand(made_for))
        return on_base(artifact, load_base(where), compose.tokenizer(where), precision=precision)


def load(
    ref: str | Artifact,
    *,
    base: str | None = None,
    store: Store | None = None,
    precision: Precision = "fp32",
) -> FewShotClassifier:
    """A classifier out of the store: see `FewShotClassifier.load`."""
    return FewShotClassifier.load(ref, base=base, store=store, precision=precision)


def on_base(
    artifact: Artifact,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    name: str = _ADAPTER,
    precision: Precision = "fp32",
) -> FewShotClassifier:
    """A classifier on a base that is there already, its adapter resident under `name`. Raises as `load`."""
    spec, tensors = read_files(artifact)
    rows = rows_of(artifact)
    compose.attach(model, name, artifact)
    classifier = FewShotClassifier(model, tokenizer, spec, tensors, name=name, precision=precision)
    classifier.rows = rows or ()
    return classifier


def head_member(
    views: Sequence[View], head: Head, words: Sequence[Sequence[int]], *, adapted: bool = True
) -> tuple[Views, dict[str, Tensor]]:
    """A head over views as a member, and its tensors."""
    read = tuple((view.template, view.pool) for view in views)
    spoken = tuple(tuple(ids) for ids in words) if head.strength else ()
    member = Views(adapted=adapted, views=read, words=spoken, strength=head.strength)
    return member, {"offset": head.offset, **{f"view.{i}": w for i, w in enumerate(head.weights) if len(w)}}


def _task(base: str | Path) -> str | None:
    """`masked_lm` for an encoder that was saved without a head (which class it would get else says nothing)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model_config(locate(base).directory, BaseRequest())
    bare = all(name.endswith("Model") for name in config.architectures or ("?",))
    known = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "masked_lm" if bare and known and not getattr(config, "is_decoder", False) else None


def load_base(base: str | Path, **options: Any) -> PreTrainedModel:
    """The base in float32, with the language-modelling head it was saved with; `options` are `compose.load`'s.

    Raises
    ------
    DataError
        It is an encoder-decoder.
    """
    model = compose.load(base, **{"dtype": "fp32", "task": _task(base), **options})
    if model.config.is_encoder_decoder:
        raise DataError(f"{base} is an encoder-decoder; few-shot classifiers read one stack of layers", hint=_BASES)
    return model
