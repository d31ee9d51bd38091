"""What a classifier says of itself: its files in an artifact, checked against each other."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from torch import Tensor

from hub.errors import NotFound
from hub.store import Artifact
from train.errors import DataError
from train.fewshot.classifier.members import Demonstrations, Member, Views
from train.fewshot.examples import Example

__all__ = ["FACTS", "HEAD", "READER", "ROWS", "Spec", "read_files", "rows_of", "spec_of"]

FACTS = "aux/fewshot.json"
HEAD = "aux/head.safetensors"
ROWS = "aux/rows.jsonl"  # the training rows, where they were asked to be kept
READER = "few_shot"  # the name of `compose.readers.few_shot`, in manifests
_TextsAndLabel: TypeAdapter[tuple[str, str | None, str]] = TypeAdapter(tuple[str, str | None, str])


class Spec(BaseModel):
    """What a classifier reads and how: `aux/fewshot.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: str
    task: Literal["classification", "multi_label_classification", "regression"] = "classification"
    labels: tuple[str, ...] = Field(max_length=999)  # () of a regression
    thresholds: tuple[float, ...] = ()  # of several labels a text: the probability from which it has each
    members: tuple[Member, ...] = Field(min_length=1, max_length=16)
    shares: tuple[float, ...]  # of the members in the answer; they sum to one
    max_length: int = Field(ge=2, le=1 << 16)
    base_task: str = "masked_lm"
    precision: Literal["fp32", "bf16"] = "fp32"  # that it was learned in; answers are computed in fp32
    columns: tuple[str, str | None] = ("text", None)  # of its rows: the text, and the second one of a pair
    label: str = "label"  # the column of the answer
    separator: str | None = None  # of several labels in one text

    @model_validator(mode="after")
    def _fits(self) -> Self:
        least = {"classification": 2, "multi_label_classification": 1, "regression": 0}[self.task]
        if len(self.labels) < least or (self.task == "regression" and self.labels):
            raise ValueError(f"{len(self.labels)} labels for {self.task}")
        if len(self.thresholds) != (len(self.labels) if self.task == "multi_label_classification" else 0):
            raise ValueError(f"{len(self.thresholds)} thresholds for {self.task} with {len(self.labels)} labels")
        if self.task != "classification" and not (len(self.members) == 1 and isinstance(self.members[0], Views)):
            raise ValueError(f"{self.task} is read by one member with a head")
        total = sum(self.shares)
        if len(self.shares) != len(self.members) or min(self.shares) < 0 or abs(total - 1) > 1e-4:
            raise ValueError(f"{len(self.members)} members need as many shares that sum to one, not {self.shares}")
        for member in self.members:
            if member.words and len(member.words) != len(self.outputs):
                raise ValueError(f"words of {len(member.words)} labels, not of {len(self.labels)}")
            if isinstance(member, Demonstrations) and len(member.said) != len(self.labels):
                raise ValueError("each label needs a word for solved examples")
        return self

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what its heads say: the labels, or one number."""
        return self.labels or ("number",)


def spec_of(artifact: Artifact) -> Spec:
    """What a published classifier says of itself. Raises as `load`."""
    return read_files(artifact)[0]


def rows_of(artifact: Artifact) -> list[Example] | None:
    """The rows that a published classifier was learned from, where it holds them.

    Raises
    ------
    DataError
        What it holds is malformed.
    """
    if ROWS not in artifact.files:
        return None
    lines = artifact.file(ROWS).read_text(encoding="utf-8").splitlines()
    try:
        return [Example(*_TextsAndLabel.validate_json(line)) for line in lines]
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise DataError(f"{ROWS} of {artifact.ref} is malformed: {why}", hint=f"hub verify {artifact.ref}") from error


def read_files(artifact: Artifact) -> tuple[Spec, list[dict[str, Tensor]]]:
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
                member.head(own, len(spec.outputs))
    except (ValueError, SafetensorError) as error:
        raise DataError(f"{HEAD} of {artifact.ref}: {error}", hint=hint) from error
    return spec, tensors
