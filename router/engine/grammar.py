"""What a continuation must look like: grammars, and what one leaves of each next token's logits.

Masks are computed by llguidance: it reads JSON schemas keyword by keyword and refuses those that it does not know,
needs no table of grammar times vocabulary made beforehand, and is one package without dependencies.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hub.errors import HubError

_KEPT = 64  # grammars that were read; the next row of one begins at once
MOST_TEXT = 100_000  # characters of a grammar
# One space behind a comma and a colon, and none elsewhere: what models write anyway, and no endless space.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarError(HubError):
    """A grammar that cannot be used; `param` is the field of the request that it came from."""

    def __init__(self, param: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


@dataclass(frozen=True)
class Grammar:
    """Texts that may be written.

    Attributes
    ----------
    kind
        "json_schema" (`text` is the schema in JSON), "regex" or "lark" (llguidance's dialect).
    param
        The field of a request that it stands in, for errors.
    """

    kind: str
    text: str
    param: str = "grammar"

    @classmethod
    def json_schema(cls, schema: Any, param: str = "grammar") -> Grammar:
        """Values that a JSON schema allows, on one line."""
        return cls("json_schema", json.dumps(schema), param)


def lark_json(schema: Any) -> str:
    """A JSON schema inside a Lark grammar."""
    layout = {"x-guidance": _LAYOUT}
    return "%json " + json.dumps({**schema, **layout} if isinstance(schema, dict) else schema)


class Constraint:
    """Where one row stands in its grammar."""

    def __init__(self, matcher: Any, param: str) -> None:
        self._matcher, self._param = matcher, param
        self.stuck = False  # no token may come

    def mask(self, logits: Tensor) -> Tensor | None:
        """Logits (V,) with minus infinity for tokens that may not come; None where none may."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(packed, bitorder="little")[: len(logits)]
        allowed = np.zeros(len(logits), dtype=bool)
        allowed[: len(found)] = found
        self.stuck = bool(self._matcher.is_error()) or not allowed.any()
        return None if self.stuck else logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """A token has come."""
        self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> GrammarError:
        """Why no token may come."""
        told = _brief(self._matcher.get_error()) or "no token fits"
        return GrammarError(self._param, f"{self._param} cannot be followed here: {told}", hint="a simpler grammar")


class CompiledGrammar:
    """A grammar over a base's tokens; each row that follows it begins anew."""

    def __init__(self, matcher: Any, param: str) -> None:
        self._matcher, self._param, self._lock = matcher, param, Lock()

    def begin(self) -> Constraint:
        """At its start."""
        with self._lock:
            return Constraint(self._matcher.deep_copy(), self._param)


class Grammars:
    """Grammars over the tokens of one base.

    Parameters
    ----------
    tokenizer, vocabulary, ends
        Of transformers, one of its fast ones; the width of the logits; tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        self._from, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._read: Any = None  # the tokenizer, by llguidance
        self._made: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock, self._reading = Lock(), Lock()

    def get(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar over these tokens; from any thread.

        Raises
        ------
        GrammarError
            llguidance is not installed, it cannot read the tokenizer, or the grammar is wrong or beyond what it knows.
        """
        with self._lock:
            found = self._made.pop(grammar, None)
            if found is not None:
                self._made[grammar] = found
                return found
        found = self.compile(grammar)  # may take seconds, which no other grammar waits for
        with self._lock:
            self._made[grammar] = found
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return found

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """As :meth:`get`, read anew."""
        param = grammar.param
        if find_spec("llguidance") is None:
            raise GrammarError(
                param,
                f"{param} needs a package that is not installed: llguidance",
                hint="pip install moduloom[structured]",
            )
        from llguidance import LLMatcher

        if len(grammar.text) > MOST_TEXT:
            raise GrammarError(param, f"{param} has {len(grammar.text)} characters", hint=f"at most {MOST_TEXT}")
        tokens = self._tokens(param)
        try:
            text = _internal(grammar)
        except (ValueError, RecursionError) as error:  # nested too deep, or a number beyond what is read
            raise GrammarError(param, f"{param} cannot be read: {_brief(str(error))}", hint="a simpler one") from error
        matcher = LLMatcher(tokens, text, log_level=0)
        if problem := matcher.get_error():
            raise GrammarError(
                param,
                f"{param} cannot be followed: {_brief(problem)}",
                hint="the keywords that are known: docs/run-and-serve.md, Structured output",
            )
        compiled = CompiledGrammar(matcher, param)
        first = compiled.begin()  # what nothing fits, or what is too large, is told before the row begins
        if first.mask(torch.zeros(self._vocabulary)) is None:
            raise first.error
        return compiled

    def _tokens(self, param: str) -> Any:
        from llguidance.hf import from_tokenizer

        with self._reading:
            if self._read is None:
                try:
                    width = max(self._vocabulary, len(self._from))
                    self._read = from_tokenizer(self._from, n_vocab=width, eos_token=self._ends or None)
                except (ValueError, RuntimeError, TypeError) as error:
                    told = f"this base's tokenizer cannot be read by llguidance: {_brief(str(error))}"
                    raise GrammarError(param, told, hint="a base with a fast tokenizer (tokenizer.json)") from error
            return self._read


def _internal(grammar: Grammar) -> str:
    """In llguidance's own form. Raises GrammarError."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.text))
    if not isinstance(json.loads(grammar.text), dict):
        raise GrammarError(grammar.param, f"{grammar.param} is no JSON schema: it must be an object")
    return str(LLMatcher.grammar_from_json_schema(grammar.text, overrides=_LAYOUT))


def _brief(text: str) -> str:
    """On one line of bounded length."""
    return " ".join(text.partition("<state>")[0].split())[:200]  # behind it llguidance tells its own state


def any_of(texts: Sequence[str], param: str) -> Grammar:
    """One of some texts."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts), param)
