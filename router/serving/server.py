"""What the endpoints share: the engine, bodies, rows, counts and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from hub.errors import UsageError
from router.engine.engine import Engine
from router.engine.request import Request as RowRequest
from router.engine.request import Result
from router.serving.catalogue import Catalogue
from router.serving.errors import Errors, FieldError
from router.serving.metrics import Metrics
from router.serving.streams import Words, events
from router.serving.waiting import Rows
from router.serving.wire.body import Answer, Body, Usage, usage

MAX_BODY = 8 * 2**20  # bytes
DIGEST = "x-moduloom-digest"  # the header that tells which version answered
BodyT = TypeVar("BodyT", bound=Body)
_PATHS = {"generate": "/v1/completions", "classify": "/v1/classify"}


class Server:
    """One engine behind HTTP.

    Parameters
    ----------
    token, directories, waiting, names
        See `router.serving.app.create_app`.
    tool_format
        How the base writes calls of tools; None: as its chat template shows.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        token: str | None,
        directories: bool,
        waiting: int,
        names: Sequence[str],
        tool_format: str | None,
    ) -> None:
        self.engine, self.token, self.tool_format = engine, token, tool_format
        self.metrics = Metrics(engine)
        engine.scheduler.waiting = waiting
        self.catalogue = Catalogue(engine, directories=directories, name=next(iter(names), engine.host.name))
        self.errors = Errors([str(engine.sources.store.root)])

    async def body(self, request: Request, model: type[BodyT]) -> BodyT:
        """A JSON body of bounded size. Raises UsageError or pydantic's ValidationError."""
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY:
                raise UsageError(f"the body is larger than {MAX_BODY // 2**20} MiB")
        try:
            value = json.loads(data, parse_constant=_no_number)
            _refuse_half_characters(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the body is not JSON: {error}") from error
        body = model.model_validate(value)
        body.refuse()
        return body

    async def rows(self, requests: Sequence[RowRequest], task: str = "generate") -> Rows:
        """Rows of one request, looked up and queued. Raises HubError where one cannot run, before any is queued."""
        prepared = await run_in_threadpool(lambda: [self.engine.prepare(r) for r in requests])
        for row in prepared:
            if task in _PATHS and not row.open and (row.target.task == "generate") != (task == "generate"):
                other = _PATHS["classify" if task == "generate" else "generate"]
                raise UsageError(f"{row.target.text or 'the base'} does not {task}", hint=f"POST {other}")
        return Rows(self.engine.scheduler, prepared)

    def count(self, results: list[Result], copies: int = 1) -> Usage:
        """Usage of a request, which goes into the metrics as well."""
        told = usage(results, copies)
        self.metrics.count(told.prompt_tokens, told.completion_tokens)
        return told

    def stream(self, rows: Rows, words: Words, copies: int = 1) -> Response:
        """An answer in pieces."""
        parts = events(rows, words, self.errors, lambda results: self.count(results, copies))
        return StreamingResponse(
            parts, media_type="text/event-stream", headers={"Cache-Control": "no-store", **_told(rows)}
        )

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        with self.engine.host.encoding:
            return str(self.engine.host.encoder.decode(ids))


def answer(value: Answer, rows: Rows) -> Response:
    """JSON, with the digest of what answered."""
    return JSONResponse(value.model_dump(), headers=_told(rows))


def _told(rows: Rows) -> dict[str, str]:
    return {} if rows.digest is None else {DIGEST: rows.digest}


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_half_characters(value: object) -> None:
    """FieldError for a body that holds a lone surrogate, which no answer could repeat."""
    fields = value.items() if isinstance(value, dict) else [("the body", value)]
    for name, part in fields:
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            field = ascii(name).strip("'")
            message = f"{field} holds half a character (a lone surrogate)"
            raise FieldError(field, message, hint="leave it out") from None
