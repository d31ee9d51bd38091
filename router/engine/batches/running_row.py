"""A row under way: what was written for it so far, and how its next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from time import monotonic
from typing import Any

from torch import Tensor

from compose.expr.tree import Expr
from hub.errors import HubError
from router.engine.batches.detokenize import Detokenizer
from router.engine.batches.sampling import Sampler, best_tokens
from router.engine.batches.token_text import TokenText
from router.engine.mixture import RunningMixture
from router.engine.pooling import Pool
from router.engine.prepare import PreparedRow
from router.engine.request import Piece, Result, Token


class RunningRow:
    """A row of a running batch.

    ``on_piece`` is called with each piece of text as it comes. ``result`` is there when it has ended, or ``error``;
    ``first`` is the time (`time.monotonic`) of its first token.
    """

    def __init__(self, prepared: PreparedRow, tokenizer: Any, on_piece: Callable[[Piece], None] | None = None) -> None:
        request = prepared.request
        self.prepared, self.on_piece = prepared, on_piece
        self.result: Result | None = None
        self.error: HubError | None = None
        self.cancelled = False
        self.written = 0
        self.last = 0
        self.first: float | None = None
        self.mix: RunningMixture | None = None  # of an ensemble, once its prompt is being read
        self.decoding = self.lanes  # without the prompts that its cache holds, once it has been read
        self._tokenizer = tokenizer
        self._tokens: list[Token] = []
        self._reported = 0  # of the tokens
        self._prompt: list[Token] = []
        self._detokenizer = Detokenizer(tokenizer, prepared.before, request.stop, request.keep)
        self.constraint = None if prepared.grammar is None else prepared.grammar.begin()
        self.sampler = Sampler.of(request, prepared.before, self.constraint)
        self.pool = None if prepared.pooling is None else Pool(prepared.pooling)

    @property
    def lanes(self) -> tuple[Expr, ...]:
        """What is applied to it: one composition, or that of each of an ensemble's experts."""
        return self._lanes_of(self.prepared)

    @staticmethod
    def _lanes_of(prepared: PreparedRow) -> tuple[Expr, ...]:
        mixture = prepared.target.mixture
        return (prepared.expr,) if mixture is None else mixture.experts

    def choose(self, prepared: PreparedRow) -> None:
        """Take what a router has chosen; it has not begun yet."""
        request = prepared.request
        self.prepared, self.decoding = prepared, self._lanes_of(prepared)
        self._detokenizer = Detokenizer(self._tokenizer, prepared.before, request.stop, request.keep)

    def take(self, token: int, logits: Tensor, ends: frozenset[int]) -> None:
        """Append a token chosen from logits (V,); ends the row where it has to."""
        self.last = token
        self.written += 1
        self.first = self.first or monotonic()
        request = self.prepared.request
        if self.mix is not None:
            mixture = self.prepared.target.mixture
            if mixture is not None and self.written == 1 and request.weights:
                self.prepared = replace(self.prepared, weights=mixture.named(self.mix.weights))
            self.mix.take(token)
        if token in ends:
            return self._end("stop")
        if request.scores:
            self._tokens.append(self._scored(token, logits))
        self._say(self._detokenizer.push(token))
        if self._detokenizer.stopped or (self.constraint is not None and self.constraint.done):
            self._end("stop")
        elif self.written == self.prepared.room:
            self._end("length")
        return None

    def read(self, token: int, logits: Tensor) -> None:
        """The prompt's next token, and the logits (V,) that the model gave before it."""
        first = self.prepared.ids[0]
        self._prompt = self._prompt or [Token(*self._named(first, 0.0), raw=self._pieces.bytes(first))]
        self._prompt.append(self._scored(token, logits))

    def _scored(self, token: int, logits: Tensor) -> Token:
        log_prob, best = best_tokens(logits, token, self.prepared.request.scores)
        named = tuple(self._named(t, p) for t, p in best)
        own, others = self._pieces.bytes(token), tuple(self._pieces.bytes(t) for t, _ in best)
        return Token(*self._named(token, log_prob), named, own, others)

    def _named(self, token: int, log_prob: float) -> tuple[str, float]:
        return self._pieces.bytes(token).decode(errors="replace"), log_prob

    @cached_property
    def _pieces(self) -> TokenText:
        return TokenText(self._tokenizer)

    def embed(self) -> None:
        """End the row with its vector, once all its states have been pooled."""
        assert self.pool is not None  # noqa: S101 - it was asked for
        vector, target = self.pool.vector, self.prepared.target
        if any(map(math.isnan, vector)):
            self.fail()
            return
        told: dict[str, Any] = {"weights": self.prepared.weights, "read": len(self.prepared.ids)}
        self.result = Result(embedding=vector, adapter=target.text, digest=target.digest, **told)

    def _end(self, why: str) -> None:
        self._say(self._detokenizer.close(), last=True)
        self.result = Result(
            text=self._detokenizer.text,
            finish=why,
            tokens=tuple(self._tokens),
            prompt=tuple(self._prompt),
            weights=self.prepared.weights,
            read=len(self.prepared.ids),
            written=self.written,
            adapter=self.prepared.target.text,
            digest=self.prepared.target.digest,
        )

    def _say(self, text: str, *, last: bool = False) -> None:
        if self.on_piece is not None and (text or (last and self._reported < len(self._tokens))):
            self.on_piece(Piece(text, tuple(self._tokens[self._reported :])))
            self._reported = len(self._tokens)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be computed for it."""
        return self.result is not None or self.error is not None or self.cancelled

    @property
    def answer(self) -> Result | HubError:
        """What became of it."""
        answer = self.result or self.error
        assert answer is not None  # noqa: S101 - asked for once it is over
        return answer

    def fail(self) -> None:
        """End the row: the model gives NaN for it, or its grammar allows no token."""
        if self.constraint is not None and self.constraint.stuck:
            self.error = self.constraint.error
            return
        name = self.prepared.target.text or "the base"
        self.error = HubError(f"{name} gives NaN", ref=name, hint="`hub verify` it, or compute in fp32")
