"""Real registries on loopback, and stock clients in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

import uvicorn

from hub.registry.app import create_app
from hub.registry.context import Context
from hub.registry.limits import Limits
from hub.registry.tokens import Tokens, add
from hub.store import Store

ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")


@dataclass
class Answer:
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Site:
    """A running registry."""

    url: str
    store: Store
    context: Context
    home: Path
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: Any = None,
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> Answer:
        """One plain HTTP request: no client library stands between the test and the bytes."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = dict(headers or {})
        if isinstance(body, (dict, list)):
            body, sent = json.dumps(body).encode(), {"Content-Type": "application/json", **sent}
        if token is not None:
            sent["Authorization"] = f"Bearer {self.tokens.get(token, token)}"
        try:
            connection.request(method, path, body=body, headers=sent, encode_chunked=hasattr(body, "__next__"))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """Bytes as they are; what the server answers until it closes."""
        found = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as stream, suppress(ConnectionError):
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            while part := stream.recv(65536):
                found += part
        return found

    def stock(self, script: str, *, token: str | None = None, fails: bool = False, **env: str) -> Any:
        """Run a script with stock clients in a process of its own; returns what it printed as JSON.

        HF_ENDPOINT leads to this registry, HF_HOME is fresh for the site. `fails` expects an uncaught exception and
        returns its last line.
        """
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": self.tokens.get(token, token)} if token else {}),
            **env,
        }
        text = f"import json, sys\nfrom huggingface_hub import *\napi = HfApi()\n{script}"
        done = subprocess.run(
            [sys.executable, "-c", text], env={**keep, **variables}, capture_output=True, text=True, timeout=240
        )
        if fails:
            assert done.returncode != 0, done.stdout
            return done.stderr.strip()
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


@contextmanager
def running(root: Path, home: Path, *, tokens: Path | None = None, **options: Any) -> Iterator[Site]:
    """Serve a store in a thread until the block ends."""
    store = Store(root)
    app = create_app(store, authority=Tokens(tokens) if tokens else None, **options)
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Site(url, store, app.state.registry, home)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client as it is without the environment of the tests: online, with a cache of its own."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return cache


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A registry without tokens."""
    with running(tmp_path / "served", tmp_path / "hf") as found:
        yield found


@pytest.fixture
def small_site(tmp_path: Path) -> Iterator[Site]:
    """A registry with small limits: files over 2 kB go by git-lfs, none may have more than 64 kB."""
    limits = Limits(inline=2000, file=64_000, commit=100_000, json=20_000, operations=50, idle=1.0)
    with running(tmp_path / "small", tmp_path / "hf-small", limits=limits) as found:
        yield found


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Site]:
    """A registry with tokens: alice owns acme, bob owns bob, reader may read acme, root owns all."""
    path = tmp_path / "tokens.json"
    made = {
        "alice": add(path, "alice", read_scopes=(), write_scopes=("acme",)),
        "bob": add(path, "bob", read_scopes=(), write_scopes=("bob",)),
        "reader": add(path, "reader", read_scopes=("acme",), write_scopes=()),
        "root": add(path, "root", read_scopes=(), write_scopes=("*",)),
    }
    with running(tmp_path / "guarded", tmp_path / "hf-guarded", tokens=path, visibility="public") as found:
        found.tokens.update(made)
        yield found


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Serve a store of one's own: ``with serve(root) as site``."""
    return lambda root, **options: running(root, tmp_path_factory.mktemp("hf"), **options)


def commit_body(files: dict[str, bytes], *, parent: str | None = None, deleted: tuple[str, ...] = ()) -> bytes:
    """A commit as clients send it."""
    import base64

    header: dict[str, Any] = {"summary": "test", "description": ""}
    if parent is not None:
        header["parentCommit"] = parent
    lines: list[dict[str, Any]] = [{"key": "header", "value": header}]
    for path, data in files.items():
        value = {"content": base64.b64encode(data).decode(), "path": path, "encoding": "base64"}
        lines.append({"key": "file", "value": value})
    lines += [{"key": "deletedFile", "value": {"path": path}} for path in deleted]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.fixture
def send_commit() -> Callable[..., Answer]:
    """Commit files to a repository over plain HTTP; the repository is made when needed."""

    def send(
        site: Site,
        name: str,
        files: dict[str, bytes],
        *,
        branch: str = "main",
        token: str | None = None,
        **options: Any,
    ) -> Answer:
        namespace, _, short = name.partition("/")
        site.ask("/api/repos/create", "POST", {"name": short, "organization": namespace}, token=token)
        return site.ask(f"/api/models/{name}/commit/{branch}", "POST", commit_body(files, **options), token=token)

    return send


@pytest.fixture
def send_directory(send_commit: Callable[..., Answer]) -> Callable[..., str]:
    """Commit a directory over plain HTTP; returns the commit id."""

    def send(site: Site, name: str, directory: Path, **options: Any) -> str:
        files = {
            p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
        }
        answer = send_commit(site, name, files, **options)
        assert answer.status == 200, answer.body
        return str(answer.json()["commitOid"])

    return send


@pytest.fixture
def tag() -> Callable[..., Answer]:
    """Tag a revision over plain HTTP."""

    def send(site: Site, name: str, label: str, revision: str = "main", token: str | None = None) -> Answer:
        return site.ask(f"/api/models/{name}/tag/{revision}", "POST", {"tag": label}, token=token)

    return send


@pytest.fixture
def body() -> Callable[..., bytes]:
    """Make the body of a commit."""
    return commit_body


@pytest.fixture
def chromium() -> str:
    """The browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine (Debian package chromium)")
    return found
