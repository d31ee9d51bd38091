"""The application: `create_app` wires a store, its drafts, who may do what, and the routes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from hub.errors import HubError
from hub.registry.context import Context
from hub.registry.errors import ApiError, from_hub, without_paths
from hub.registry.guard import LOOPBACK, Guard
from hub.registry.limits import Limits
from hub.registry.protocol import account, files, repos, uploads
from hub.registry.state.drafts import Drafts
from hub.registry.state.repositories import Repos
from hub.registry.tokens import Authority, Everyone
from hub.registry.web import views
from hub.store import Store

logger = logging.getLogger("hub.registry")


def create_app(
    store: Store,
    *,
    authority: Authority | None = None,
    limits: Limits | None = None,
    visibility: str | None = None,
    keep: float | None = None,
) -> FastAPI:
    """Registry over a store.

    Parameters
    ----------
    store
        Where published artifacts are; drafts are kept in its directory ``registry``.
    authority
        Who may do what; None lets everyone do everything, and answers to the names of this machine only.
    limits
        How much is taken in.
    visibility
        ``public`` or ``private``: of repositories about which nobody has said it. Private where there are tokens,
        unless given.
    keep
        Seconds after which a draft that no branch and no tag stands for is forgotten; None keeps all of them.

    Raises
    ------
    StoreError
        The store cannot be written.
    """
    store.create()
    drafts = Drafts(store.root / "registry", keep)
    open_house = authority is None
    visibility = visibility or ("public" if open_house else "private")
    context = Context(Repos(store, drafts, visibility), authority or Everyone(), limits or Limits())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(drafts.sweep)
        yield

    app = FastAPI(title="moduloom registry", openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.registry = context
    app.add_middleware(Guard, hosts=LOOPBACK if open_house else None)
    app.mount("/static", StaticFiles(directory=views.STATIC), name="static")
    for router in (account.router, uploads.router, files.router, repos.router, views.router):
        for route in router.routes:  # whatever can be read can be asked for its head
            if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
                route.methods.add("HEAD")
        app.include_router(router)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HubError, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        api_error = error
    elif isinstance(error, HubError):
        api_error = from_hub(error)
    elif isinstance(error, HTTPException):
        api_error = ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    else:
        api_error = ApiError(400, _first_problem(error))
    if api_error.status >= 500:
        logger.error("%s %s: %s", request.method, request.url.path, api_error.message)
        if isinstance(error, HubError):  # what is wrong with the disk here is nobody else's business
            api_error = ApiError(api_error.status, "the registry cannot use its store just now; its log says why")
    return views.refusal(request, without_paths(api_error, _paths(request)))


def _paths(request: Request) -> list[Path]:
    """Directories of this machine that a message may name."""
    root = request.app.state.registry.repos.store.root
    return [root, root.absolute(), root.resolve(), Path(tempfile.gettempdir())]


def _first_problem(error: Exception) -> str:
    if not isinstance(error, RequestValidationError) or not error.errors():
        return "the request is malformed"
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"


async def _failed(request: Request, _error: Exception) -> Response:
    return views.refusal(request, ApiError(500, "the registry failed; its log says why"))
