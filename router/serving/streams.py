"""Both completion endpoints: one answer in JSON, or server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from hub.errors import HubError
from router.engine.request import Piece, Result
from router.serving import wire
from router.serving.errors import Errors
from router.serving.waiting import Rows


@dataclass(frozen=True)
class AnswerFormat:
    """How an endpoint words its answers: objects of a whole one and of a part, and a choice of each."""

    prefix: str
    whole: str
    part: str
    choice: Callable[[int, Result], dict[str, Any]]
    piece: Callable[[Piece, int], dict[str, Any]]


COMPLETION = AnswerFormat("cmpl", "text_completion", "text_completion", wire.completion_choice, wire.completion_piece)
CHAT = AnswerFormat("chatcmpl", "chat.completion", "chat.completion.chunk", wire.chat_choice, wire.chat_piece)


async def events(
    rows: Rows,
    asked: wire.Sampled,
    shape: AnswerFormat,
    count: Callable[[list[Result]], dict[str, int]],
    errors: Errors,
) -> AsyncIterator[str]:
    """Server-sent events: a piece of text each with its tokens' scores, the reasons why rows ended, and [DONE].

    Rows are given up where nobody listens any more. `count` is told the results and gives their usage.
    """
    ident, with_usage = wire.identifier(shape.prefix), bool((asked.stream_options or {}).get("include_usage"))

    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        frame = wire.frame(shape.part, ident, asked.model, choices)
        return _event({**frame, "usage": usage} if with_usage else frame)

    def part(index: int, piece: Piece, start: int = 0, finish: str | None = None) -> str:
        return event([{"index": index, **shape.piece(piece, start), "finish_reason": finish}])

    if shape is CHAT:
        for index in range(len(rows)):
            start = {"role": "assistant", "content": ""}
            yield event([{"index": index, "delta": start, "logprobs": None, "finish_reason": None}])
    results: dict[int, Result] = {}
    ends = [0] * len(rows)  # characters of the tokens that were told
    try:
        async for index, news in rows.news():
            if isinstance(news, HubError):
                yield _event(errors.of(news, "messages" if shape is CHAT else "prompt")[1])
                return
            if isinstance(news, Piece):
                yield part(index, news, ends[index])
                ends[index] += sum(len(token.text) for token in news.tokens)
                continue
            results[index] = news
            if news.text is None:  # a router has chosen an adapter that answers with a label
                yield part(index, Piece(wire.said(news)))
            yield part(index, Piece(""), finish=news.finish or "stop")
        usage = count([results[index] for index in range(len(rows))])
        if with_usage:
            yield event([], usage)
        yield "data: [DONE]\n\n"
    finally:
        rows.cancel()  # does nothing to rows that have ended


def _event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"
