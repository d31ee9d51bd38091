"""GET /v1/models, and what loads and unloads adapters."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from router.serving.server import Server
from router.serving.wire.others import Load, Unload


async def models(server: Server, _request: Request) -> Response:
    """All that can be named, the base first."""
    return JSONResponse({"object": "list", "data": await run_in_threadpool(server.catalogue.models)})


async def model(server: Server, request: Request) -> Response:
    """One of them."""
    name = str(request.path_params["name"])
    return JSONResponse(await run_in_threadpool(server.catalogue.model, name))


async def load(server: Server, request: Request) -> Response:
    """Let a name stand for a ref or a directory."""
    asked = await server.body(request, Load)
    await run_in_threadpool(server.catalogue.load, asked.lora_name, asked.lora_path, replace=asked.load_inplace)
    return PlainTextResponse(f"{asked.lora_name} is loaded")


async def unload(server: Server, request: Request) -> Response:
    """Forget a name."""
    asked = await server.body(request, Unload)
    await run_in_threadpool(server.catalogue.unload, asked.lora_name)
    return PlainTextResponse(f"{asked.lora_name} is unloaded")
