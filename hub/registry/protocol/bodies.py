"""Request bodies: small ones with a cap, large ones as a stream for a thread."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qs

import anyio
from anyio.from_thread import run as from_thread
from starlette.requests import ClientDisconnect, Request

from hub.errors import ManifestError
from hub.io import canonical_json as canonical
from hub.registry.errors import ApiError, too_large
from hub.registry.limits import MIB, Limits

BLOCK = MIB  # bytes handed to the thread at a time
_DRAIN = 8 * MIB  # bytes of a refused body that are read and thrown away, so that the client sees the answer

T = TypeVar("T")


async def read_capped(request: Request, limit: int, idle: float) -> bytes:
    """Whole body of at most `limit` bytes; ApiError (413) beyond, (408) where it takes over `idle` seconds."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large("the body", limit)
    parts, size = [], 0
    try:
        with anyio.fail_after(idle):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large("the body", limit)
                parts.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {idle:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None
    return b"".join(parts)


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """Body that is a JSON object; an empty one is ``{}``."""
    data = await read_capped(request, limits.json, limits.idle)
    try:
        value = canonical.loads(data, what="the body", limit=limits.json) if data.strip() else {}
    except ManifestError as error:
        raise ApiError(400, error.message) from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return value


async def read_form(request: Request, limits: Limits) -> dict[str, list[str]]:
    """Body that is a form (or a JSON object), as name -> values."""
    if request.headers.get("content-type", "").startswith("application/json"):
        value = await read_object(request, limits)
        return {
            name: [str(item) for item in entry] if isinstance(entry, list) else [str(entry)]
            for name, entry in value.items()
        }
    data = await read_capped(request, limits.json, limits.idle)
    try:
        return parse_qs(data.decode(), keep_blank_values=True, max_num_fields=2000)
    except (UnicodeDecodeError, ValueError) as error:
        raise ApiError(400, f"the body is not a form: {error}") from error


async def in_thread(
    request: Request, limits: Limits, limiter: anyio.CapacityLimiter, work: Callable[[Iterator[bytes]], T]
) -> T:
    """Run `work` in a thread of its own, giving it the body in blocks.

    The uploads' limiter is apart from the one of all other requests, so slow uploads hold up no reader.

    Raises
    ------
    ApiError
        408 when nothing arrives for `Limits.idle` seconds; what `work` raises.
    """
    stream = request.stream()

    async def block() -> bytes:
        parts, size = [], 0
        while size < BLOCK:
            with anyio.fail_after(limits.idle):
                chunk = await anext(stream, None)
            if chunk is None:
                break
            parts.append(chunk)
            size += len(chunk)
        return b"".join(parts)

    def blocks() -> Iterator[bytes]:
        while arrived := _arrived(block, limits):
            yield arrived

    try:
        return await anyio.to_thread.run_sync(work, blocks(), limiter=limiter)
    except ApiError:
        await _drain(stream, limits)
        raise


def _arrived(block: Callable[[], Coroutine[Any, Any, bytes]], limits: Limits) -> bytes:
    try:
        return from_thread(block)
    except TimeoutError:
        raise ApiError(408, f"nothing arrived for {limits.idle:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None


async def _drain(stream: Any, limits: Limits) -> None:
    left = _DRAIN
    try:
        with anyio.move_on_after(min(limits.idle, 5.0)):
            async for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    return
    except (ClientDisconnect, RuntimeError):  # gone, or read to its end already
        return
