"""Downloading a base from a hub, spoken to over loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "README.md": b"card",
    "pytorch_model.bin": b"pickle",
    "onnx/model.json": b"{}",
}


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append(path)  # type: ignore[attr-defined]
        if path.startswith(f"/org/little/resolve/{COMMIT}/"):
            data = FILES[path.split(f"{COMMIT}/")[1]]
            self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        elif path.startswith("/api/models/org/little/tree/"):
            tree = [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in FILES.items()]
            self._send(200, json.dumps(tree).encode(), {})
        elif path.startswith("/api/models/org/little/revision/no-such-branch"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif path.startswith("/api/models/org/little"):
            info = {"id": "org/little", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self._send(200, json.dumps(info).encode(), {})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def locate(hub: ThreadingHTTPServer, cache: Path, *names: str) -> list[str]:
    """Locate in a process of its own: the hub's address is read once, when its client is imported."""
    code = (
        "import sys\nfrom compose.base.location import locate\nfrom hub.errors import HubError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        found = locate(name)\n"
        "        print(found.name, found.revision, *sorted(p.name for p in found.directory.iterdir()))\n"
        "    except HubError as error:\n        print(type(error).__name__, error, '|', error.hint)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    return done.stdout.splitlines()


def test_a_base_is_downloaded_without_its_pickles(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    found, missing, bad, modules = locate(hub, tmp_path, "org/little", "org/absent", "org/little@no-such-branch")
    assert found == f"org/little {COMMIT} config.json model.safetensors tokenizer.json"
    asked = {path for path in hub.seen if "/resolve/" in path}  # type: ignore[attr-defined]
    assert asked == {
        f"/org/little/resolve/{COMMIT}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert missing.startswith("NotFound the Hugging Face Hub does not give 'org/absent'")
    assert "hf auth login" in missing
    assert bad.startswith("NotFound the Hugging Face Hub does not give 'org/little@no-such-branch'")
    assert modules == "[]"
