"""POST /v1/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from router.engine.request import Piece, Result
from router.serving.server import Server, answer
from router.serving.wire.body import Answer, Usage, identifier, now, said
from router.serving.wire.completions import (
    Completion,
    CompletionAnswer,
    CompletionChoice,
    CompletionChunk,
    choice,
    echoed,
    piece,
)


async def completions(server: Server, request: Request) -> Response:
    """Continuations of prompts."""
    asked = await server.body(request, Completion)
    wanted = asked.requests()
    rows = await server.rows(wanted)
    if asked.stream:
        return server.stream(rows, CompletionWords(asked, rows.digest), asked.n)
    results = await rows.results(request)
    choices = [choice(i, result) for i, result in enumerate(results)]
    if asked.echo:
        nothing_new = asked.max_tokens == 0
        texts = [r.text if r.ids is None else server.decoded(r.ids) for r in wanted]
        told = zip(choices, results, texts, strict=True)
        choices = [echoed(c, r, text, nothing_new=nothing_new) for c, r, text in told]
        results = [replace(r, written=0) for r in results] if nothing_new else results
    told_usage = server.count(results, asked.n)
    return answer(CompletionAnswer(**_frame(asked, rows.digest), choices=choices, usage=told_usage), rows)


def _frame(asked: Completion, digest: str | None) -> dict[str, Any]:
    return {"id": identifier("cmpl"), "created": now(), "model": asked.model, "system_fingerprint": digest}


class CompletionWords:
    """A stream of it."""

    field, done = "prompt", "data: [DONE]\n\n"

    def __init__(self, asked: Completion, digest: str | None) -> None:
        self._frame = _frame(asked, digest)
        self._chunk = CompletionAnswer if asked.with_usage else CompletionChunk
        self._ends: Counter[int] = Counter()  # characters of the tokens that were told, of each row

    def begin(self, rows: int) -> Iterator[Answer]:
        """Nothing."""
        yield from ()

    def piece(self, index: int, part: Piece) -> Iterator[Answer]:
        """Text."""
        yield self._told(piece(index, part, self._ends[index]))
        self._ends[index] += sum(len(token.text) for token in part.tokens)

    def end(self, index: int, result: Result) -> Iterator[Answer]:
        """Why it ended."""
        if result.text is None:  # a router has chosen an adapter that answers with a label
            yield self._told(CompletionChoice(index=index, text=said(result)))
        yield self._told(CompletionChoice(index=index, text="", finish_reason=result.finish or "stop"))

    def close(self, usage: Usage) -> Iterator[Answer]:
        """Usage, where it was asked for."""
        if self._chunk is CompletionAnswer:
            yield CompletionAnswer(**self._frame, choices=[], usage=usage)

    def broke(self, error: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return error

    def _told(self, part: CompletionChoice) -> Answer:
        return self._chunk(**self._frame, choices=[part])
