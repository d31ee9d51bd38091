"""Server-sent events of rows under way; what they say is left to the endpoint."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

from hub.errors import HubError
from router.engine.request import Piece, Result
from router.serving.errors import Errors
from router.serving.waiting import Rows
from router.serving.wire.body import Answer, Usage

Told = Iterable[Answer]


class Words(Protocol):
    """How an endpoint words what happens to the rows of one request, by their index."""

    field: str  # where the request has its text, for errors
    done: str  # what comes last

    def begin(self, rows: int) -> Told:
        """Before anything is there."""

    def piece(self, index: int, piece: Piece) -> Told:
        """More of a row."""

    def end(self, index: int, result: Result) -> Told:
        """A row has ended."""

    def close(self, usage: Usage) -> Told:
        """All have."""

    def broke(self, error: dict[str, Any]) -> dict[str, Any]:
        """What is said of an error, from its body in OpenAI's shape."""


async def events(rows: Rows, words: Words, errors: Errors, count: Any) -> AsyncIterator[str]:
    """Events, until all rows have ended or one has failed. Rows are given up where nobody listens any more.

    `count` is told the results and gives their usage.
    """
    results: dict[int, Result] = {}
    try:
        for told in words.begin(len(rows)):
            yield _event(told.model_dump())
        async for index, news in rows.news():
            if isinstance(news, HubError):
                yield _event(words.broke(errors.of(news, words.field)[1]))
                return
            if isinstance(news, Piece):
                for told in words.piece(index, news):
                    yield _event(told.model_dump())
                continue
            results[index] = news
            for told in words.end(index, news):
                yield _event(told.model_dump())
        for told in words.close(count([results[index] for index in range(len(rows))])):
            yield _event(told.model_dump())
        yield words.done
    finally:
        rows.cancel()  # does nothing to rows that have ended


def _event(value: dict[str, Any]) -> str:
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {json.dumps(value)}\n\n"
