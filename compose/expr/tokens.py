"""The words of expression text: tokens with their places, quoting, and errors that point at a place.

    ref     ns/name  ns/name@1.2.0  ns/name@prod  ns/name@sha256:<64 hex>  name      (else in double quotes)
    number  2  0.5  .3  1e-3
    signs   + - * >> ( ) [ ] , =

A minus between two refs needs spaces around it, because names may hold one: ``a - b`` is a difference, ``a-b`` a name.
White space and ``#`` comments separate tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from compose.errors import ExpressionError

MAX_TEXT = 2**18  # characters
IDENTITY_WORD = "identity"

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REF = re.compile(rf"{_WORD}(?:/{_WORD})?(?:@{_WORD}(?::{_WORD})?)?")
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![A-Za-z0-9_/@]|[.-][A-Za-z0-9_])")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\\\n]*\'')
_SIGN = re.compile(r">>|[-+*()\[\],=]")
_SPACE = re.compile(r"(?:\s|#[^\n]*)+")
_WIDTH = 76  # columns of text shown with an error


@dataclass(frozen=True)
class Token:
    """One word: ``kind`` is "number", "ref", "string" or "sign"; ``text`` is decoded for strings."""

    kind: str
    text: str
    start: int
    end: int


def tokens(text: str) -> Iterator[Token]:
    """Split ``text`` into tokens; ExpressionError at the first character that belongs to none."""
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"an expression of {len(text)} characters is too long (at most {MAX_TEXT})")
    place = 0
    patterns = (("string", _STRING), ("number", _NUMBER), ("ref", _REF), ("sign", _SIGN))
    while place < len(text):
        if space := _SPACE.match(text, place):
            place = space.end()
            continue
        kind, match = next(((k, m) for k, p in patterns if (m := p.match(text, place))), ("", None))
        if match is None:
            raise _stranger(text, place)
        word = match.group()
        yield Token(kind, _decode(text, word, place) if kind == "string" else word, place, match.end())
        place = match.end()


def _stranger(text: str, place: int) -> ExpressionError:
    char = text[place]
    if char in "\"'":
        return error_at(text, place, len(text), "this quote is never closed")
    hint = None
    if char in "<>=!~":
        hint = 'put a ref with a version range in quotes: "ns/name>=1,<2"'
    elif char == "/":
        hint = "there is no division: multiply by a decimal number, 0.5 * a"
    return error_at(text, place, place + 1, f"{char!r} has no meaning here", hint=hint)


def _decode(text: str, word: str, place: int) -> str:
    if word[0] == "'":
        return word[1:-1]
    try:
        return str(json.loads(word, strict=False))
    except ValueError as error:
        raise error_at(text, place, place + len(word), "escapes in quotes are those of JSON") from error


def string(text: str) -> str:
    """``text`` in double quotes, as :func:`tokens` reads it back."""
    return json.dumps(text, ensure_ascii=False)


def quote(ref: str) -> str:
    """The text of a ref, in quotes only where it would not be read back bare."""
    bare = _REF.fullmatch(ref) and not _NUMBER.fullmatch(ref) and ref != IDENTITY_WORD
    return ref if bare else string(ref)


def error_at(text: str, start: int, end: int, message: str, *, hint: str | None = None) -> ExpressionError:
    """Error whose message ends with the line of ``text`` and carets under ``text[start:end]``."""
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    left = max(line_start, start - _WIDTH // 2)  # a long line is shown around the place
    right = min(line_end, left + _WIDTH)
    shown = "".join(c if c.isprintable() else " " for c in text[left:right])
    before, after = ("..." if left > line_start else ""), ("..." if right < line_end else "")
    carets = "^" * max(1, min(end, right) - start)
    indent = " " * (len(before) + start - left)
    return ExpressionError(f"{message}\n  {before}{shown}{after}\n  {indent}{carets}", hint=hint)
