"""/v1/classify, /v1/embeddings, /tokenize, /detokenize, and what loads and unloads adapters."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, StrictInt

from router.engine.request import Request, Result
from router.serving.errors import FieldError
from router.serving.wire.body import Answer, Body, Usage, bounded, brief, weights_of
from router.serving.wire.completions import prompts_of


class Classify(Body):
    """POST /v1/classify: texts, or pairs of texts as lists of two."""

    model: str = ""
    input: str | list[str | Annotated[list[str], Field(min_length=2, max_length=2)]]
    task: str | None = None

    def requests(self) -> list[Request]:
        """One row a text."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        bounded(len(texts))
        pairs = [(text, None) if isinstance(text, str) else (text[0], text[1]) for text in texts]
        shared: dict[str, Any] = {"adapter": self.model, "task": self.task, "scores": 1000}
        return [Request(text=text, pair=pair, **shared) for text, pair in pairs]


class Classified(Answer):
    """The answer of one text: a label, a number, or what an encoder-decoder wrote."""

    index: int
    text: str | None = brief()
    value: float | None = brief()
    label: str | None = brief()
    labels: list[str] | None = brief()
    scores: dict[str, float] | None = brief()
    route_weights: dict[str, float] | None = brief()


class ClassifyAnswer(Answer):
    """The answer of a request."""

    id: str
    object: str = "list"
    model: str
    data: list[Classified]
    usage: Usage


def classified(index: int, result: Result) -> Classified:
    """An entry of /v1/classify."""
    told = Classified(index=index, text=result.text, value=result.value, route_weights=weights_of(result))
    if result.label is not None or result.labels is not None:
        told.label, told.scores = result.label, dict(result.scores)
        told.labels = None if result.labels is None else list(result.labels)
    return told


class Embed(Body):
    """POST /v1/embeddings."""

    model: str = ""
    input: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["auto", "mean", "last", "cls"] = "auto"
    normalize: bool = True
    task: str | None = None

    def requests(self) -> list[Request]:
        """One row a text."""
        texts = prompts_of(self.input)
        bounded(len(texts))
        told: dict[str, Any] = {"adapter": self.model, "pooling": self.pooling, "task": self.task}
        return [
            Request(text=text, **told) if isinstance(text, str) else Request(ids=tuple(text), **told) for text in texts
        ]

    def check(self, width: int) -> None:
        """Raise FieldError for more dimensions than there are."""
        if self.dimensions is not None and self.dimensions > width:
            told = f"dimensions is {self.dimensions}, and the base's vectors have {width}"
            raise FieldError("dimensions", told, hint=f"at most {width}")

    def vector(self, result: Result) -> list[float] | str:
        """The first `dimensions` numbers, of length 1, as it was asked for."""
        cut = np.array(result.embedding, dtype=np.float64)[: self.dimensions]
        length = float(np.linalg.norm(cut))
        if self.normalize and length > 0:
            cut = cut / length
        if self.encoding_format == "base64":
            return base64.b64encode(cut.astype("<f4").tobytes()).decode("ascii")
        return [float(number) for number in cut.astype(np.float32)]


class Embedding(Answer):
    """The vector of one text."""

    index: int
    object: str = "embedding"
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answer):
    """The answer of a request."""

    object: str = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


def embedded(asked: Embed, results: Sequence[Result]) -> EmbeddingAnswer:
    """The vectors of all texts."""
    read = sum(r.read for r in results)
    data = [Embedding(index=i, embedding=asked.vector(result)) for i, result in enumerate(results)]
    return EmbeddingAnswer(model=asked.model, data=data, usage=EmbeddingUsage(prompt_tokens=read, total_tokens=read))


class Tokenize(Body):
    """POST /tokenize."""

    model: str = ""
    prompt: str
    add_special_tokens: bool = True

    def request(self) -> Request:
        """A row that would read them."""
        return Request(text=self.prompt, adapter=self.model, special=self.add_special_tokens, max_new_tokens=1)


class Detokenize(Body):
    """POST /detokenize."""

    model: str = ""
    tokens: list[StrictInt]


class Load(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class Unload(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
