"""Servers wait for nobody for ever: heads that trickle in, answers that nobody reads, too many connections."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

import uvicorn

from hub.io.listen import patient

IDLE = 0.6
MOST = 4


async def app(scope, receive, send) -> None:
    """Answers at once, slowly, or with a lot."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * IDLE)
    for _ in range(400 if scope["path"] == "/much" else 1):
        await send({"type": "http.response.body", "body": b"x" * 2**18, "more_body": True})
    await send({"type": "http.response.body", "body": b"."})


@pytest.fixture
def server() -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(
        app, port=0, http=patient(IDLE, MOST), log_level="error", lifespan="off", timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join(10)


@contextmanager
def connected(server: uvicorn.Server) -> Iterator[socket.socket]:
    port = server.servers[0].sockets[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as stream:
        yield stream


def closed_within(stream: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the server hangs up, while one more byte is sent every tenth of a second."""
    start = time.monotonic()
    stream.settimeout(0.1)
    while time.monotonic() - start < 20:
        try:
            if drip:
                stream.sendall(drip)
            if not stream.recv(2**16):
                return time.monotonic() - start
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - start
    return float("inf")


GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"


def answer(stream: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b".\r\n0\r\n\r\n"):
        part = stream.recv(2**20)
        if not part:
            break
        got += part
    return got


def test_nothing_is_said(server) -> None:
    with connected(server) as stream:
        assert IDLE / 2 < closed_within(stream) < 10


def test_a_head_that_trickles_in(server) -> None:
    with connected(server) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ")
        assert IDLE / 2 < closed_within(stream, b"a") < 10


def test_the_second_head_of_a_connection(server) -> None:
    with connected(server) as stream:
        stream.sendall(GET % b"")
        assert answer(stream).endswith(b".\r\n0\r\n\r\n")
        stream.sendall(b"GET / HTTP/1.1\r\n")
        assert IDLE / 2 < closed_within(stream, b"X") < 10


def test_an_answer_that_nobody_reads(server) -> None:
    with connected(server) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.sendall(GET % b"much")
        deadline = time.monotonic() + 20
        while not server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.server_state.connections


def test_an_answer_may_take_its_time(server) -> None:
    with connected(server) as stream:
        stream.sendall(GET % b"slow")
        assert answer(stream).endswith(b".\r\n0\r\n\r\n")
    with connected(server) as stream:  # and so may a reader who reads
        stream.sendall(GET % b"much")
        got = 0
        while part := stream.recv(2**22):
            got += len(part)
            if part.endswith(b".\r\n0\r\n\r\n"):
                break
        assert got > 400 * 2**18


def test_there_is_room_for_so_many(server) -> None:
    with connected(server) as one, connected(server) as two, connected(server) as three, connected(server) as four:
        for stream in (one, two, three, four):
            stream.sendall(GET % b"slow")
        time.sleep(IDLE / 2)
        with connected(server) as fifth:
            assert fifth.recv(100).startswith(b"HTTP/1.1 503")
            assert fifth.recv(100) == b""
        for stream in (one, two, three, four):
            assert answer(stream).endswith(b".\r\n0\r\n\r\n")
    deadline = time.monotonic() + 10
    while server.server_state.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    with connected(server) as stream:
        stream.sendall(GET % b"")
        assert answer(stream)
