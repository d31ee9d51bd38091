"""Texts longer than a model's context: overlapping windows that together predict every token once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hub.errors import UsageError


@dataclass(frozen=True)
class Window:
    """Read the tokens from `start`, predict those from `first` up to `end` (exclusive)."""

    start: int
    first: int
    end: int


def windows(length: int, context: int, overlap: int) -> Iterator[Window]:
    """Windows of at most `context` tokens; after the first, each token has at least `overlap` tokens before it.

    >>> [(w.start, w.first, w.end) for w in windows(10, 6, 2)]
    [(0, 1, 6), (4, 6, 10)]
    """
    if not 0 < overlap < context:
        raise UsageError(
            f"an overlap of {overlap} tokens does not fit a context of {context}", hint="0 < overlap < context"
        )
    start, first = 0, 1
    while first < length:
        end = min(start + context, length)
        yield Window(start, first, end)
        start, first = end - overlap, end
