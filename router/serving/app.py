"""The HTTP API: OpenAI's endpoints over one base, where `model` names an adapter, an expression or a router.

>>> app = create_app(Engine("builtin:tiny-lm"))        # any ASGI server runs it
"""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hub.errors import HubError, UsageError
from router.engine.engine import Engine
from router.engine.request import Request as RowRequest
from router.engine.request import Result
from router.serving import wire
from router.serving.catalogue import Catalogue
from router.serving.errors import Errors, FieldError, may_retry, refusal
from router.serving.metrics import Metrics
from router.serving.streams import CHAT, COMPLETION, AnswerFormat, events
from router.serving.waiting import Rows

MAX_BODY = 8 * 2**20  # bytes
BodyT = TypeVar("BodyT", bound=wire.Body)
_OPEN = ("/health", "/ready")
_TEXT_FIELDS = {"/v1/chat/completions": "messages", "/v1/classify": "input"}
_LATER = {"Retry-After": "1"}  # seconds; a place becomes free whenever a row ends


class Server:
    """What the endpoints share."""

    def __init__(
        self, engine: Engine, *, token: str | None, directories: bool, waiting: int, names: Sequence[str]
    ) -> None:
        self.engine, self.token = engine, token
        self.metrics = Metrics()
        engine.scheduler.waiting = waiting
        engine.scheduler.watchers.append(self.metrics)
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

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await self.body(request, wire.Completion)
        return await self.complete(request, asked, asked.requests(), COMPLETION)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = await self.body(request, wire.Chat)
        return await self.complete(request, asked, asked.requests(self.engine.host.tokenizer), CHAT)

    async def complete(
        self, request: Request, asked: wire.Sampled, wanted: list[RowRequest], shape: AnswerFormat
    ) -> Response:
        """The continuations of one request, whole or in pieces."""
        rows = await self.rows(wanted, "generate")
        if asked.stream:
            parts = events(rows, asked, shape, lambda results: self.count(results, asked.n), self.errors)
            return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        results = await rows.results(request)
        choices = [shape.choice(i, result) for i, result in enumerate(results)]
        if isinstance(asked, wire.Completion) and asked.echo:
            nothing_new = asked.max_tokens == 0
            texts = [r.text if r.ids is None else self.decoded(r.ids) for r in wanted]
            told = zip(choices, results, texts, strict=True)
            choices = [wire.echoed(c, r, text, nothing_new=nothing_new) for c, r, text in told]
            results = [replace(r, written=0) for r in results] if nothing_new else results
        whole = wire.frame(shape.whole, wire.identifier(shape.prefix), asked.model, choices)
        return self.answer({**whole, "usage": self.count(results, asked.n)})

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        with self.engine.host.encoding:
            return str(self.engine.host.encoder.decode(ids))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the tokens that a completion would read."""
        asked = await self.body(request, wire.Tokenize)
        row = await run_in_threadpool(lambda: self.engine.prepare(asked.request()))
        told = {"count": len(row.ids), "max_model_len": self.engine.host.context, "tokens": row.ids}
        return self.answer(told)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        asked = await self.body(request, wire.Detokenize)
        most = len(self.engine.host.tokenizer)
        if wrong := [token for token in asked.tokens if not 0 <= token < most]:
            raise FieldError("tokens", f"there is no token {wrong[0]}", hint=f"tokens are 0 to {most - 1}")
        return self.answer({"prompt": self.decoded(asked.tokens)})

    async def classify(self, request: Request) -> Response:
        """POST /v1/classify."""
        asked = await self.body(request, wire.Classify)
        results = await (await self.rows(asked.requests(), "classify")).results(request)
        data = [wire.classified(i, result) for i, result in enumerate(results)]
        answer = {"id": wire.identifier("classify"), "object": "list", "model": asked.model, "data": data}
        return self.answer({**answer, "usage": self.count(results, 1)})

    async def rows(self, requests: list[RowRequest], task: str) -> Rows:
        """Rows of one request, looked up and queued. Raises HubError where one cannot run, before any is queued."""
        prepared = await run_in_threadpool(lambda: [self.engine.prepare(r) for r in requests])
        for row in prepared:
            if not row.open and (row.target.task == "generate") != (task == "generate"):
                other = "/v1/classify" if task == "generate" else "/v1/completions"
                raise UsageError(f"{row.target.text or 'the base'} does not {task}", hint=f"POST {other}")
        return Rows(self.engine.scheduler, self.metrics, prepared)

    def count(self, results: list[Result], copies: int) -> dict[str, int]:
        """Usage of a request, which goes into the metrics as well."""
        usage = wire.usage(results, copies)
        self.metrics.read += usage["prompt_tokens"]
        self.metrics.written += usage["completion_tokens"]
        return usage

    @staticmethod
    def answer(value: object) -> Response:
        """JSON."""
        return JSONResponse(value)

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return self.answer({"object": "list", "data": await run_in_threadpool(self.catalogue.models)})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = str(request.path_params["name"])
        return self.answer(await run_in_threadpool(self.catalogue.model, name))

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        asked = await self.body(request, wire.Load)
        await run_in_threadpool(self.catalogue.load, asked.lora_name, asked.lora_path, replace=asked.load_inplace)
        return PlainTextResponse(f"{asked.lora_name} is loaded")

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        asked = await self.body(request, wire.Unload)
        await run_in_threadpool(self.catalogue.unload, asked.lora_name)
        return PlainTextResponse(f"{asked.lora_name} is unloaded")

    async def health(self, _request: Request) -> Response:
        """GET /health: 200 while the engine lives, also while it ends what is under way."""
        scheduler = self.engine.scheduler
        return _state(scheduler.alive or scheduler.draining)

    async def ready(self, _request: Request) -> Response:
        """GET /ready: 200 while requests are taken."""
        return _state(self.engine.scheduler.alive)

    async def prometheus(self, _request: Request) -> Response:
        """GET /metrics."""
        running, waiting = self.engine.scheduler.counts
        residency = self.engine.residency
        gauges = [
            ("running_rows", "Rows that are computed.", running),
            ("waiting_rows", "Rows that wait.", waiting),
            ("resident_adapters", "Adapters in memory.", len(residency.resident)),
            ("resident_bytes", "Bytes of their tensors.", residency.bytes),
        ]
        counters = [
            ("adapter_hits_total", "Adapters asked for that were in memory.", residency.counts.hits),
            ("adapter_reads_total", "Adapters read from disk.", residency.counts.read),
            ("adapter_evictions_total", "Adapters that made room.", residency.counts.evicted),
        ]
        return PlainTextResponse(self.metrics.text(gauges, counters), media_type="text/plain; version=0.0.4")


def create_app(
    engine: Engine,
    *,
    token: str | None = None,
    directories: bool = False,
    waiting: int = 1024,
    names: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> FastAPI:
    """The API over an engine.

    Parameters
    ----------
    token
        Who sends it (`Authorization: Bearer ...`) is let in; None lets everyone in.
    directories
        Whether clients may load adapters from directories of this machine, and not only refs of its store.
    waiting
        Rows that may wait; more are answered with 429.
    names
        Names of the base besides its own; the first is what /v1/models calls it.
    origins
        Web pages that may ask (CORS), as `https://example.org`, or `*` for any.
    """
    engine.targets.bases.update(names)
    server = Server(engine, token=token, directories=directories, waiting=waiting, names=names)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        engine.scheduler.start()
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(lifespan=life, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    for method, path, endpoint in (
        ("POST", "/v1/completions", server.completions),
        ("POST", "/v1/chat/completions", server.chat),
        ("POST", "/v1/classify", server.classify),
        ("POST", "/tokenize", server.tokenize),
        ("POST", "/detokenize", server.detokenize),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name:path}", server.model),
        ("POST", "/v1/load_lora_adapter", server.load),
        ("POST", "/v1/unload_lora_adapter", server.unload),
        ("GET", "/health", server.health),
        ("GET", "/ready", server.ready),
        ("GET", "/metrics", server.prometheus),
    ):
        app.add_route(path, _guarded(server, path, endpoint), methods=[method])

    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])

    async def unknown(_request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            found, body = server.errors.of(error)
            return JSONResponse(body, status_code=found)
        status = error.status_code
        what = "no such path" if status == 404 else "this path takes another method" if status == 405 else "refused"
        found, body = refusal(status, what, "not_found" if status == 404 else "refused")
        return JSONResponse(body, status_code=found, headers=error.headers)

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, unknown)
    return app


def _guarded(
    server: Server, path: str, endpoint: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint behind the token, its errors in OpenAI's shape, its answers counted."""

    async def run(request: Request) -> Response:
        try:
            if server.token is not None and path not in _OPEN and not _allowed(request, server.token):
                status, body = refusal(401, "a valid token is needed (Authorization: Bearer ...)", "invalid_api_key")
                response: Response = JSONResponse(body, status_code=status)
            else:
                response = await endpoint(request)
        except ClientDisconnect:  # nobody is there to answer
            response = Response(status_code=499)
        except (HubError, ValidationError) as error:
            status, body = server.errors.of(error, _TEXT_FIELDS.get(path, "prompt"))
            later = _LATER if may_retry(body["error"]["code"]) else None
            response = JSONResponse(body, status_code=status, headers=later)
        server.metrics.requests[path, response.status_code] += 1
        return response

    return run


def _state(good: bool) -> Response:
    return Response(status_code=200) if good else Response(status_code=503, headers=_LATER)


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


def _allowed(request: Request, token: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
