"""`hub registry` as a process: what it prints, whom it serves, what it refuses to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.console.sizes import parse_size
from hub.errors import UsageError
from hub.registry import commands
from hub.registry.tokens import add

START = [sys.executable, "-c", "from hub.registry.commands import registry; registry(prog_name='hub registry')"]


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([*START, "--port", "0", *options], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    return said


def status(url: str, path: str = "/-/health") -> int:
    host = url.removeprefix("http://")
    for _ in range(200):
        try:
            connection = HTTPConnection(host, timeout=5)
            connection.request("GET", path)
            return connection.getresponse().status
        except ConnectionError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


def test_without_tokens_it_serves_this_machine_and_says_so(tmp_path: Path) -> None:
    process, url = start("--store", str(tmp_path / "store"))
    assert url.startswith("http://127.0.0.1:")
    assert status(url) == 200
    said = stop(process)
    assert f"serving the store {tmp_path / 'store'}" in said
    assert "no tokens: this machine only" in said
    assert f"HF_ENDPOINT={url}" in said
    assert process.returncode == 0
    assert "Traceback" not in said


def test_with_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    add(path, "ci", read_scopes=(), write_scopes=("acme",))
    process, url = start("--store", str(tmp_path / "store"), "--tokens", str(path), "--host", "0.0.0.0")
    port = url.rpartition(":")[2]
    assert status(f"http://127.0.0.1:{port}", "/api/whoami-v2") == 401
    assert f"tokens: {path}" in stop(process)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_without_tokens_it_serves_nobody_else(host: str) -> None:
    done = CliRunner().invoke(commands.registry, ["--host", host])
    assert isinstance(done.exception, UsageError) and done.exception.exit_code == 2
    assert "this machine only" in str(done.exception) and "--tokens" in str(done.exception.hint)


@pytest.mark.parametrize(("text", "size"), [("500MiB", 500 * 2**20), ("1.5 G", 3 * 2**29), ("12", 12), ("2TB", 2**41)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1PB", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_the_missing_extra_is_named() -> None:
    """Without the packages of the extra, the command says what to install; nothing else needs them."""
    script = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("fastapi", "nh3") else real(name, *rest)
from hub.errors import UsageError
from hub.registry.commands import registry
assert not {"fastapi", "uvicorn", "jinja2"} & set(sys.modules)
try:
    registry(["--port", "0"], standalone_mode=False)
except UsageError as error:
    print(error, "|", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "fastapi, nh3" in done.stdout
    assert "pip install moduloom[server]" in done.stdout


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = subprocess.run(
        [*START, "--port", "0", "--store", str(tmp_path / "file" / "store")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "StoreError" in done.stderr and "not a directory" in done.stderr


def test_a_killed_server_leaves_a_sound_store(tmp_path: Path, packed) -> None:
    """kill -9 while commits and tags are under way; the next server serves what was answered with 200."""
    import base64
    import json
    import threading

    from hub.registry.state.drafts import Drafts
    from hub.store import Store

    root = tmp_path / "store"
    directory, _ = packed("acme/tone@1.0.0")
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in directory.iterdir()}
    del files["module.json"]

    def commit(host: str, name: str, note: str) -> bool:
        entries = [{"key": "header", "value": {"summary": note}}]
        text = base64.b64encode(note.encode()).decode()
        entries += [{"key": "file", "value": {"path": p, "content": c}} for p, c in {**files, "note.txt": text}.items()]
        body = "\n".join(json.dumps(entry) for entry in entries).encode()
        for path, data in (
            ("/api/repos/create", json.dumps({"name": name, "organization": "acme"}).encode()),
            (f"/api/models/acme/{name}/commit/main", body),
            (f"/api/models/acme/{name}/tag/main", json.dumps({"tag": "1.0.0"}).encode()),
        ):
            connection = HTTPConnection(host, timeout=10)
            connection.request("POST", path, body=data)
            answer = connection.getresponse()
            answer.read()
            if answer.status not in (200, 409):
                return False
        return True

    done: set[str] = set()

    def work(host: str, index: int, rounds: int) -> None:
        for step in range(50):
            name = f"a{rounds}-{index}-{step}"
            try:
                if commit(host, name, name):
                    done.add(name)
            except (OSError, ValueError):  # the server was killed
                return

    for rounds in range(4):
        process, url = start("--store", str(root))
        status(url)
        host = url.removeprefix("http://")
        threads = [threading.Thread(target=work, args=(host, index, rounds)) for index in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3 + 0.25 * rounds)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for thread in threads:
            thread.join(20)
        store = Store(root)
        assert store.verify() == []
    assert len(done) >= 4
    assert {f"acme/{name}" for name in done} <= set(store.names())
    drafts = Drafts(root / "registry")
    with drafts.read() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
