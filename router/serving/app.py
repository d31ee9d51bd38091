"""The HTTP API: OpenAI's endpoints over one base, where `model` names an adapter, an expression or a router.

>>> app = create_app(Engine("builtin:tiny-lm"))        # any ASGI server runs it
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hub.errors import HubError
from router.engine.engine import Engine
from router.serving.endpoints import chat, completions, models, responses, state, texts
from router.serving.errors import LATER, may_retry, refusal
from router.serving.server import DIGEST, Server
from router.serving.tool_format import TOOL_FORMATS

_OPEN = ("/health", "/ready")
_TEXT_FIELDS = {
    "/v1/chat/completions": "messages",
    "/v1/classify": "input",
    "/v1/embeddings": "input",
    "/v1/responses": "input",
}
_ROUTES: tuple[tuple[str, str, Callable[[Server, Request], Awaitable[Response]]], ...] = (
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/chat/completions", chat.chat),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/embeddings", texts.embeddings),
    ("POST", "/v1/classify", texts.classify),
    ("POST", "/tokenize", texts.tokenize),
    ("POST", "/detokenize", texts.detokenize),
    ("GET", "/v1/models", models.models),
    ("GET", "/v1/models/{name:path}", models.model),
    ("POST", "/v1/load_lora_adapter", models.load),
    ("POST", "/v1/unload_lora_adapter", models.unload),
    ("GET", "/health", state.health),
    ("GET", "/ready", state.ready),
    ("GET", "/metrics", state.metrics),
)


def create_app(
    engine: Engine,
    *,
    token: str | None = None,
    directories: bool = False,
    waiting: int = 1024,
    names: Sequence[str] = (),
    origins: Sequence[str] = (),
    tool_format: str | None = None,
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
    tool_format
        How the base writes calls of tools (see `router.serving.tool_formats`); None: as its chat template shows.

    Raises
    ------
    UsageError
        There is no such format.
    """
    if tool_format is not None:
        TOOL_FORMATS.get(tool_format)
    engine.targets.bases.update(names)
    server = Server(engine, token=token, directories=directories, waiting=waiting, names=names, tool_format=tool_format)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        engine.scheduler.start()
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(lifespan=life, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    for method, path, endpoint in _ROUTES:
        app.add_route(path, _guarded(server, path, endpoint), methods=[method])

    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[DIGEST],
        )

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
    server: Server, path: str, endpoint: Callable[[Server, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint behind the token, its errors in OpenAI's shape, its answers counted."""

    async def run(request: Request) -> Response:
        try:
            if server.token is not None and path not in _OPEN and not _allowed(request, server.token):
                status, body = refusal(401, "a valid token is needed (Authorization: Bearer ...)", "invalid_api_key")
                response: Response = JSONResponse(body, status_code=status)
            else:
                response = await endpoint(server, request)
        except ClientDisconnect:  # nobody is there to answer
            response = Response(status_code=499)
        except (HubError, ValidationError) as error:
            status, body = server.errors.of(error, _TEXT_FIELDS.get(path, "prompt"))
            later = LATER if may_retry(body["error"]["code"]) else None
            response = JSONResponse(body, status_code=status, headers=later)
        server.metrics.requests.labels(path, response.status_code).inc()
        return response

    return run


def _allowed(request: Request, token: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
