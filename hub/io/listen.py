"""What every server of the project does alike: its packages, loopback, and one listening socket."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hub.errors import UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

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


def listen(app: FastAPI, host: str, port: int, *, access_log: bool, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. ``announce`` is told the address once connections are taken; port 0 is a free one."""
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
            uvicorn.Server(config).run(sockets=[listener])
