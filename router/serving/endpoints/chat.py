"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from router.engine.request import Piece, Result
from router.serving.server import Server, answer
from router.serving.tool_reader import News, Said, ToolReader
from router.serving.wire.body import Answer, Usage, identifier, now, said
from router.serving.wire.chat import (
    Chat,
    ChatAnswer,
    ChatChunk,
    ChatChunkWithUsage,
    ChatPiece,
    Delta,
    Scores,
    choice,
    delta_of,
    scores,
)
from router.serving.wire.tools import Toolbox


async def chat(server: Server, request: Request) -> Response:
    """Answers in a conversation."""
    asked = await server.body(request, Chat)
    tokenizer = server.engine.host.tokenizer
    tools = asked.toolbox(tokenizer, server.tool_format)
    rows = await server.rows(asked.requests(tokenizer, tools))
    if asked.stream:
        return server.stream(rows, ChatWords(asked, tools, rows.digest), asked.n)
    results = await rows.results(request)
    choices = [choice(i, result, asked.top_logprobs, tools) for i, result in enumerate(results)]
    told = server.count(results, asked.n)
    return answer(ChatAnswer(**_frame(asked, rows.digest), choices=choices, usage=told), rows)


def _frame(asked: Chat, digest: str | None) -> dict[str, Any]:
    return {"id": identifier("chatcmpl"), "created": now(), "model": asked.model, "system_fingerprint": digest}


class ChatWords:
    """A stream of it."""

    field, done = "messages", "data: [DONE]\n\n"

    def __init__(self, asked: Chat, tools: Toolbox | None, digest: str | None) -> None:
        self._frame = _frame(asked, digest)
        self._chunk = ChatChunkWithUsage if asked.with_usage else ChatChunk
        self._asked, self._tools = asked.top_logprobs, tools
        self._readers: dict[int, ToolReader] = {}

    def begin(self, rows: int) -> Iterator[Answer]:
        """Who speaks."""
        for index in range(rows):
            if self._tools is not None:
                self._readers[index] = self._tools.reader()
            yield self._told(index, Delta(role="assistant", content=""))

    def piece(self, index: int, part: Piece) -> Iterator[Answer]:
        """Text and calls."""
        reader = self._readers.get(index)
        if reader is None:
            news: list[News] = [Said(part.text)] if part.text else []
        else:
            news = reader.add(part.text)
        told = scores(part.tokens, self._asked)
        if not news and told is not None:
            yield self._told(index, Delta(), told)
        for one in news:
            yield self._told(index, delta_of(one), told)
            told = None

    def end(self, index: int, result: Result) -> Iterator[Answer]:
        """What was held back, and why it ended."""
        reader = self._readers.get(index)
        if result.text is None:  # a router has chosen an adapter that answers with a label
            yield self._told(index, Delta(content=said(result)))
        for one in () if reader is None else reader.close():
            yield self._told(index, delta_of(one))
        finish = result.finish or "stop"
        called = reader is not None and reader.calls > 0 and finish == "stop"
        yield self._told(index, Delta(), finish="tool_calls" if called else finish)

    def close(self, usage: Usage) -> Iterator[Answer]:
        """Usage, where it was asked for."""
        if self._chunk is ChatChunkWithUsage:
            yield ChatChunkWithUsage(**self._frame, choices=[], usage=usage)

    def broke(self, error: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return error

    def _told(self, index: int, delta: Delta, told: Scores | None = None, finish: str | None = None) -> Answer:
        part = ChatPiece(index=index, delta=delta, logprobs=told, finish_reason=finish)
        return self._chunk(**self._frame, choices=[part])
