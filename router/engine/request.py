"""What the engine is asked and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hub.errors import HubError, UsageError
from router.engine.grammar import Grammar

MAX_SCORES = 1000
POOLINGS = ("auto", "mean", "last", "cls")


class ContextExceeded(HubError):
    """A text and its continuation that are longer than what the base reads."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row.

    Attributes
    ----------
    text
        The prompt, or the text to classify; `pair` is the second text of a pair.
    ids
        A prompt's tokens, instead of a text.
    adapter
        A ref, an expression, a router or a name given to the engine; None is the bare base.
    task
        The member that answers, by its name in a router of the method ``task``.
    special
        Whether the tokenizer adds the tokens that begin a text; not to one that a chat template has made.
    max_new_tokens, stop
        Where a continuation ends, unless the model ends it: a number of tokens (None: as many as fit), or any of these
        texts (left out).
    temperature, top_p, seed
        0 is greedy decoding. A row draws from its own stream, so its text does not depend on its neighbours.
    top_k, min_p
        Only the k best tokens (0: all), and those of at least min_p times the best one's probability, may be drawn.
    repetition_penalty, frequency_penalty, presence_penalty, logit_bias
        Changes of the logits before a token is chosen: logits of all tokens so far are divided by the first (multiplied
        where they are negative); those of written tokens lose the second for each time, and the third once; and
        each (token, number) is added. Scores are those of the model, without them.
    grammar
        What a continuation must look like: tokens that do not fit are never chosen. It may still end by its length.
    keep
        Special tokens that are part of a continuation's text.
    pooling
        Asks for the text's vector instead of a continuation or a label: the mean of its last hidden states, the last
        token's, or the first one's ("cls"); "auto" is what the adapter's manifest or the base says.
    scores
        How many of the best labels, or of the best tokens at each place, come back with their (log) probabilities.
    prompt_scores
        Whether the prompt's tokens come back with theirs as well.
    weights
        Whether the weights of a router that weighs each token are wanted: their mean costs a pass of its own.
    """

    text: str = ""
    ids: tuple[int, ...] | None = None
    pair: str | None = None
    adapter: str | None = None
    task: str | None = None
    special: bool = True
    max_new_tokens: int | None = 64
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    keep: tuple[int, ...] = ()
    pooling: str | None = None
    scores: int = 0
    prompt_scores: bool = False
    weights: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; at least one token is generated")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise UsageError(f"temperature is {self.temperature}", hint="0 is greedy; 1 samples from the model")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        self._check_changes()
        if self.pooling not in (None, *POOLINGS):
            raise UsageError(f"pooling is {self.pooling!r}", hint=", ".join(POOLINGS))
        if self.prompt_scores and not self.scores:
            raise UsageError("prompt_scores are given with scores", hint="scores=1")
        if not 0 <= self.scores <= MAX_SCORES:
            raise UsageError(f"scores is {self.scores}; it must lie in 0..{MAX_SCORES}")
        if not all(self.stop):
            raise UsageError("a stop text is empty", hint="leave it out")
        for text in (self.text, self.pair or "", *self.stop):
            _refuse_half_characters(text)

    def _check_changes(self) -> None:
        if self.top_k < 0 or not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"top_k is {self.top_k}, min_p {self.min_p}", hint="top_k is 0 or more, min_p in [0, 1]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}", hint="1 changes nothing")
        added = (self.frequency_penalty, self.presence_penalty, *(bias for _, bias in self.logit_bias))
        if not all(map(math.isfinite, added)):
            raise UsageError("penalties and biases must be finite")


def _refuse_half_characters(text: str) -> None:
    """UsageError for what has no UTF-8, which a tokenizer cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"half a character (a lone surrogate) at place {error.start + 1}"
        raise UsageError(f"the text holds {where}", hint="leave it out") from None


@dataclass(frozen=True)
class Token:
    """A generated token: its text, its log probability in nats, and the best ones at its place.

    `raw` is the token's own bytes, where its text shows half a character as U+FFFD; `best_raw` those of the best.
    """

    text: str
    log_prob: float
    best: tuple[tuple[str, float], ...] = ()
    raw: bytes = b""
    best_raw: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, with the tokens (of a row that asked for scores) up to its end."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one row.

    Attributes
    ----------
    text, finish
        Of a generated row: the continuation, and why it ended ("stop" or "length").
    tokens, prompt
        Of a generated row that asked for scores; of its prompt if it asked for those. The first of a prompt stands
        behind nothing, so it has none.
    label, scores
        Of a classified row: the best label, and as many (label, probability) as were asked for, best first.
    labels
        Of a row that may have any number of labels: those that it has, in the place of ``label``.
    value
        Of a regression.
    embedding
        The vector of a text that was to be pooled (not normalized).
    weights
        What the router gave each adapter (a ref to a number); empty without a router.
    read, written
        Tokens of the prompt and of the continuation.
    adapter, digest
        What answered, as it was asked for ("": the bare base), and the digest that this stood for when the row was
        submitted: of an artifact, or of an expression with its members' digests; None where a member has none.
    """

    text: str | None = None
    finish: str | None = None
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    label: str | None = None
    labels: tuple[str, ...] | None = None
    scores: tuple[tuple[str, float], ...] = ()
    value: float | None = None
    embedding: tuple[float, ...] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    read: int = 0
    written: int = 0
    adapter: str = ""
    digest: str | None = None
