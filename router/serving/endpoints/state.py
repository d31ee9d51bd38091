"""GET /health, /ready and /metrics."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from router.serving.errors import LATER
from router.serving.metrics import CONTENT_TYPE
from router.serving.server import Server


async def health(server: Server, _request: Request) -> Response:
    """200 while the engine lives, also while it ends what is under way."""
    scheduler = server.engine.scheduler
    return _state(scheduler.alive or scheduler.draining)


async def ready(server: Server, _request: Request) -> Response:
    """200 while requests are taken."""
    return _state(server.engine.scheduler.alive)


async def metrics(server: Server, _request: Request) -> Response:
    """Counts, in Prometheus' text format."""
    return Response(server.metrics.text(), media_type=CONTENT_TYPE)


def _state(good: bool) -> Response:
    return Response(status_code=200) if good else Response(status_code=503, headers=LATER)
