"""SIGTERM: rows under way end or are told so, nobody else is let in, and readiness goes before health does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

BODY = {"prompt": "To be", "max_tokens": 490, "n": 16, "seed": 1}


@pytest.fixture
def serve(tmp_path):
    started = []

    def start(*options):
        command = [sys.executable, "-m", "hub", "serve", "builtin:tiny-lm", "--port", "0", *options]
        environment = {**os.environ, "HUB_HOME": str(tmp_path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        started.append(process)
        return process, int(process.stdout.readline().rsplit(":", 1)[1])

    yield start
    for process in started:
        process.kill()
        process.communicate()


def send(port, method, path, body=None):
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body))
    return connection.getresponse()


def status(port, path, body=None):
    response = send(port, "GET" if body is None else "POST", path, body)
    told = response.read()
    return response.status, json.loads(told) if told else None


def begin(port):
    """A stream of which something has come, and a whole answer that is under way."""
    whole = []
    thread = threading.Thread(target=lambda: whole.append(status(port, "/v1/completions", BODY)))
    thread.start()
    response = send(port, "POST", "/v1/completions", {**BODY, "stream": True})
    assert response.readline().startswith(b"data: ")
    end = time.monotonic() + 30
    while b"moduloom_running_rows 32" not in send(port, "GET", "/metrics").read():
        assert time.monotonic() < end
    return response, thread, whole


def test_within_the_grace_rows_end_and_nobody_else_is_let_in(serve):
    process, port = serve("--grace", "120")
    response, thread, whole = begin(port)
    assert status(port, "/ready")[0] == 200
    process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 10
    while status(port, "/ready")[0] == 200:
        assert time.monotonic() < end
    assert status(port, "/health")[0] == 200
    found, told = status(port, "/v1/completions", {"prompt": "To be"})
    assert (found, told["error"]["code"]) == (503, "stopped")
    events = response.read().decode()
    assert events.count('"finish_reason": "length"') + events.count('"finish_reason": "stop"') == 16
    assert events.endswith("data: [DONE]\n\n")
    thread.join(60)
    assert whole[0][0] == 200
    assert len(whole[0][1]["choices"]) == 16
    process.wait(30)


@pytest.mark.parametrize("signals", [1, 2])
def test_after_it_they_are_told(serve, signals):
    process, port = serve("--grace", "0" if signals == 1 else "120")
    response, thread, whole = begin(port)
    process.send_signal(signal.SIGTERM)
    if signals == 2:
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    *_, last = response.read().decode().strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "stopped")
    thread.join(60)
    assert (whole[0][0], whole[0][1]["error"]["code"]) == (503, "stopped")
    process.wait(30)
    assert "Traceback" not in process.stderr.read()
