r"""What a reader is: how the texts of an artifact become labels, where that is more than a head of the base.

An artifact whose manifest says `reader: NAME` is more than its adapter: templates, label words, several heads, shares.
Whoever asks it something (`hub run`, `hub serve`, `hub eval`, Python) goes through its reader, so that
all of them give the probabilities that were measured.

It is a file under ``compose/readers/``, or an entry point ``hub.readers``::

    @READERS.register("longer-than")
    class LongerThan(Reader):
        @classmethod
        def open(cls, artifact, model, tokenizer, *, name): ...
        def scores(self, texts): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from compose.base.at_hand import at_hand
from compose.errors import KindError
from hub.errors import UsageError
from hub.plugins import Registry
from hub.store import Artifact

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hub.manifest import Manifest

__all__ = ["READERS", "LinearHead", "Reader", "ReaderText", "open_reader", "refuse_readers"]

ReaderText: TypeAlias = tuple[str, "str | None"]  # a text, and the second one of a pair


@dataclass(frozen=True)
class LinearHead:
    """logits = W^T h / |h| + b, with h the mean of the last layer's states over a text's tokens.

    Attributes
    ----------
    model
        The reader's base.
    weight, bias
        (d, C) and (C,).
    adapted
        Whether the states are read with the adapter active.
    max_length
        Tokens of a text; longer ones are cut.
    """

    model: PreTrainedModel
    weight: Tensor
    bias: Tensor
    adapted: bool
    max_length: int


class Reader(ABC):
    """Texts to labels, or to a number.

    Attributes
    ----------
    task
        ``classification``: one label a text; ``multi_label_classification``: any number; ``regression``: a number.
    labels
        In the order of the scores; () of a regression.
    columns, separator
        What its training rows called their columns: the text, and the second one of a pair (None: texts stand alone);
        and what divides several labels in one text, if anything.
    """

    task: str
    labels: tuple[str, ...]
    columns: tuple[str, str | None] = ("text", None)
    separator: str | None = None

    @classmethod
    @abstractmethod
    def open(cls, artifact: Artifact, model: PreTrainedModel, tokenizer: Any, *, name: str) -> Self:
        """Read an artifact's files and make its adapter resident on the base under ``name``, frozen.

        Raises
        ------
        HubError
            Another base, or files that do not fit each other; the model is as before.
        """

    @abstractmethod
    def scores(self, texts: Sequence[ReaderText]) -> Tensor:
        """(N, C) probabilities of the labels, of ``classification`` with the sum 1; of a regression (N, 1) numbers.

        What is active on the base afterwards is of no meaning.
        """

    @abstractmethod
    def close(self) -> None:
        """Let what is resident go."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of its tensors in memory."""

    def chosen(self, scores: Tensor) -> tuple[str, ...]:
        """The labels that a text has by its scores (C,): the best one."""
        return (self.labels[int(scores.argmax())],)

    def linear_head(self) -> LinearHead:
        """The one head on unit mean states that says the same.

        Raises
        ------
        KindError
            There is none; it says what else is read.
        """
        raise KindError(f"the reader {type(self).__name__} is no single linear head")

    @classmethod
    def load_base(cls, base: str | Path, **options: Any) -> PreTrainedModel:
        """The base as the reader reads it: as it was saved, in float32. `options` are those of `compose.load`."""
        from compose.base.model import load_base

        return load_base(base, **{"dtype": "fp32", **options})


READERS = Registry[type[Reader]]("reader", package="compose.readers", group="hub.readers")


def open_reader(artifact: Artifact, base: str | Path | None = None, **options: Any) -> Reader:
    """The reader of an artifact, on a base of its own (default: the one it was made for, where that is now).

    Raises
    ------
    UsageError
        The artifact has no reader, or nothing says which base it is for.
    HubError
        As `Reader.open`; no such reader, or no such base.
    """
    from compose.base.model import tokenizer_of

    manifest = artifact.manifest
    if manifest.reader is None:
        raise UsageError(f"{artifact.ref} has no reader: a head of the base answers, or a continuation")
    if base is None and manifest.base is None:
        raise UsageError(f"{artifact.ref} does not say which base it is for", hint="give --base BASE")
    where = base or at_hand(manifest.base)  # type: ignore[arg-type]
    kind = READERS.get(manifest.reader)
    return kind.open(artifact, kind.load_base(where, **options), tokenizer_of(where), name=str(artifact.ref))


def refuse_readers(manifests: Sequence[Manifest], what: str) -> None:
    """UsageError for artifacts that answer through a reader, in a place that knows adapters and heads alone."""
    for manifest in manifests:
        if manifest.reader is not None:
            raise UsageError(
                f"{manifest.ref} answers through its reader {manifest.reader}, by itself: {what}",
                ref=manifest.ref,
                hint=f"name it alone: hub run FILE --expr {manifest.ref}",
            )
