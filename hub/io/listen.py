"""What every server of the project does alike: its packages, loopback, and one listening socket."""

from __future__ import annotations

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

# Ends what is under way before the server does, and returns at once when the event is set.
Drain: TypeAlias = Callable[[threading.Event], None]

_EXTRA = ("fastapi", "uvicorn", "jinja2", "markdown_it", "nh3")


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


def listen(
    app: FastAPI,
    host: str,
    port: int,
    *,
    access_log: bool,
    announce: Callable[[str], None],
    drain: Drain | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    announce
        Is told the address once connections are taken; port 0 is a free one.
    drain
        Called in a thread of its own at the first signal. The server answers until it returns; a second signal sets
        the event it was given.
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
                server.handle_exit = _drained(server.handle_exit, drain)  # type: ignore[method-assign]
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
