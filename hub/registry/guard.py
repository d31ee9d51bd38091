"""The first thing every request meets: its path, its Host and its Origin; and headers that every answer bears."""

from __future__ import annotations

import re
import uuid
from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(?P<name>[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?\Z")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
PAGE_POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
FILE_POLICY: Final = "default-src 'none'; sandbox; frame-ancestors 'none'"


class Guard:
    """Middleware around everything else.

    Parameters
    ----------
    app
        What is guarded.
    hosts
        Names that the server may be called by; None for any. A server without tokens answers to the names of
        this machine alone, or a web page could reach it by a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = _decode(scope.get("raw_path") or scope["path"].encode())
        refusal = self._refusal(scope, headers, path)
        if refusal is not None:
            status, reason = refusal
            response = JSONResponse({"error": reason}, status, {"X-Error-Message": reason})
            await response(scope, receive, _with_headers(send))
            return
        await self.app({**scope, "path": path}, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers, path: str | None) -> tuple[int, str] | None:
        host = _HOST.match(headers.get("host", ""))
        if host is None:
            return 400, "the Host header names no host"
        if self.hosts is not None and host["name"].lower() not in self.hosts:
            return 403, "this server has no tokens and answers to the names of its own machine only"
        if path is None:
            return 400, "the path is not UTF-8, or holds control characters"
        if scope["method"] not in _SAFE_METHODS and _cross_site(scope, headers):
            return 403, "requests that change something are not taken from other sites' pages"
        return None


def _cross_site(scope: Scope, headers: Headers) -> bool:
    origin = headers.get("origin")
    own = f"{scope['scheme']}://{headers.get('host', '')}"
    return (origin is not None and origin != own) or headers.get("sec-fetch-site", "none") in (
        "cross-site",
        "same-site",
    )


def _decode(raw: bytes) -> str | None:
    """Path with each segment decoded by itself: a slash that was escaped stays ``%2F`` and splits nothing."""
    parts = []
    for segment in raw.split(b"/"):
        try:
            text = unquote_to_bytes(segment).decode()
        except UnicodeDecodeError:
            return None
        if _CONTROL.search(text):
            return None
        parts.append(text.replace("/", "%2F"))
    return "/".join(parts)


def unslash(text: str) -> str:
    """Undo the one escape that `Guard` leaves in a path."""
    return text.replace("%2F", "/")


def _with_headers(send: Send) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("content-security-policy", PAGE_POLICY)
            headers.setdefault("x-content-type-options", "nosniff")
            headers.setdefault("referrer-policy", "no-referrer")
            headers.setdefault("cross-origin-resource-policy", "same-origin")
            headers.setdefault("x-request-id", uuid.uuid4().hex)
        await send(message)

    return sender
