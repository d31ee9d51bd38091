"""What every server of the project does alike: its packages, loopback, and one listening socket."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from hub.errors import UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

IDLE = 30.0  # seconds for the head of a request, and for a client that does not read
CONNECTIONS = 512  # at a time; each takes a file descriptor, of which a process often has 1024
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
# Ends what is under way before the server does, and returns at once when the event is set.
Drain: TypeAlias = Callable[[threading.Event], None]

_EXTRA = ("fastapi", "uvicorn", "jinja2", "markdown_it", "nh3", "prometheus_client")


def require_extra() -> None:
    """Refuse to serve, by the names of the packages, where the extra `server` is not installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"a server needs packages that are not installed: {', '.join(missing)}", hint="pip install moduloom[server]"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def patient(idle: float = IDLE, most: int = CONNECTIONS) -> type[asyncio.Protocol]:
    """HTTP protocol of uvicorn that waits for nobody for ever.

    A connection is closed where the head of a request is not whole after ``idle`` seconds, however it trickles in, or
    where the client has read nothing of an answer for so long. Of more than ``most`` connections at a time the rest is
    turned away with 503. How long a body may take is for the routes to say, and answers may take as long as they need.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Patient(base):  # type: ignore[misc]  # one of two classes, by what is installed
        _head: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            full = len(self.connections) >= most
            super().connection_made(transport)
            if full:
                transport.write(_BUSY)
                transport.close()
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self._reader or self.loop.call_later(idle, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._reader)
            self._reader = None

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._head)
            _cancel(self._reader)
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Let the clock run for as long as a head is awaited: from the first byte on, whatever comes after it."""
            if self.cycle is not None and not self.cycle.response_complete:
                _cancel(self._head)
                self._head = None
            elif self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(idle, self.transport.close)

    return Patient


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def listen(
    app: FastAPI,
    host: str,
    port: int,
    *,
    access_log: bool,
    announce: Callable[[str], None],
    drain: Drain | None = None,
    connections: int = CONNECTIONS,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    announce
        Is told the address once connections are taken; port 0 is a free one.
    drain
        Called in a thread of its own at the first signal. The server answers until it returns; a second signal sets
        the event it was given.
    connections
        At a time, at most.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=10,
        http=patient(most=connections),
        ws="none",
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches off Nagle's algorithm on what it accepts: 40 ms a request otherwise.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(128)  # who connects from now on waits for the answer
        address, taken = listener.getsockname()[:2]
        announce(f"http://{f'[{address}]' if ':' in address else address}:{taken}")
        with suppress(KeyboardInterrupt):  # Ctrl-C is how a server is told to end
            server = uvicorn.Server(config)
            if drain is not None:
                server.handle_exit = _drained(server.handle_exit, drain)  # type: ignore[method-assign, assignment]
            server.run(sockets=[listener])


def _drained(end: Callable[[int, Any], None], drain: Drain) -> Callable[[int, Any], None]:
    """A handler of signals that ends a server once it is drained."""
    hurry = threading.Event()
    threads: list[threading.Thread] = []

    def finish(signal: int) -> None:
        drain(hurry)
        end(signal, None)

    def handle(signal: int, _frame: Any) -> None:
        if threads:
            hurry.set()
            return
        threads.append(threading.Thread(target=finish, args=(signal,), name="moduloom-drain", daemon=True))
        threads[0].start()

    return handle
