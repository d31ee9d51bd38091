"""A vLLM in an environment of its own, with the plugin of this working tree, and what it answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
STARTS = 900  # seconds; a busy machine takes minutes


def install(place: Path) -> Path:
    """A folder for PYTHONPATH that has the entry points of pyproject.toml as an installed distribution has them."""
    tomllib = pytest.importorskip("tomllib")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    info = place / "moduloom-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moduloom\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items()) for group, named in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return place


class Server:
    """What is asked of it, and what it says."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log

    def ask(self, model: str, prompts: Sequence[Any], tokens: int = 24) -> dict[str, Any]:
        """Greedy continuations; an error's body, with its status, where it is refused."""
        body = {
            "model": model,
            "prompt": list(prompts),
            "max_tokens": tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        return self.post("/v1/completions", body)

    def ids(self, model: str, prompts: Sequence[Any], tokens: int = 24) -> list[list[int]]:
        """Tokens of greedy continuations, prompt by prompt."""
        answer = self.ask(model, prompts, tokens)
        assert "choices" in answer, answer
        return [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda one: one["index"])]

    def post(self, path: str, body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return {"status": 200, **json.load(answer)}
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.load(error)}

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


@contextmanager
def vllm(python: str, base: str, home: Path, place: Path, *options: str, **around: str) -> Iterator[Server]:
    """Run the server until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        **os.environ,
        "HUB_HOME": str(home),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(install(place / "installed")))),
        "VLLM_PLUGINS": "moduloom",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **around,
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "16", "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "20", *options]
    log = place / "vllm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=subprocess.STDOUT, cwd=place)
    server = Server(port, log)
    try:
        yield _ready(process, server)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], server: Server) -> Server:
    until = time.monotonic() + STARTS
    while time.monotonic() < until:
        assert process.poll() is None, server.said()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5):
                return server
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer within {STARTS} s\n{server.said()[-4000:]}")
