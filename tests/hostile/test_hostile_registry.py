"""An OCI registry that answers anything at all: only errors with a hint come of it, and nothing is admitted."""

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hub.errors import HubError
from hub.io import canonical_json as canonical
from hub.manifest import Manifest
from hub.remotes import from_url
from hub.storage.oci import image_manifest
from hub.store import Store
from hub.transfer import pull

DIGEST = "sha256:" + "a" * 64
BODIES = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"\xff\xfe",
    b'{"tags": null}',
    b'{"tags": {"a": 1}}',
    b'{"tags": [1, null, {}]}',
    b'{"tags": ["1.0", "../../etc/passwd", "", "prod", "_yanked.1.0", "_yanked.", "x\\u0000y"]}',
    b'{"tags": ["1.0"], "tags": ["2.0"]}',
    b'{"config": null, "layers": []}',
    b'{"config": {"mediaType": "application/vnd.moduloom.module.v1+json", "digest": "../../x"}}',
    b'{"config": {"mediaType": "application/vnd.moduloom.module.v1+json", "digest": 7}}',
    b'{"config": {"mediaType": "application/vnd.moduloom.module.v1+json", "digest": "' + DIGEST.encode() + b'"}}',
    b'{"artifactType": "application/vnd.moduloom.yank.v1+json", "config": {"mediaType": "x"}, "annotations": []}',
    b"[" * 5000,
    b'{"a":' * 5000,
    b"x" * 2**20,
]
HEADERS: list[dict[str, str]] = [
    {},
    {"Docker-Content-Digest": DIGEST},
    {"Docker-Content-Digest": "../../x"},
    {"Docker-Content-Digest": "sha256:"},
    {"Link": '</v2/_catalog?n=1>; rel="next"'},
    {"Link": '<file:///etc/passwd>; rel="next"'},
    {"Location": "file:///etc/passwd"},
    {"Location": "http://127.0.0.1:1/"},
    {"Content-Encoding": "gzip"},
    {"Www-Authenticate": 'Bearer realm="file:///etc/passwd"'},
    {"Www-Authenticate": "Basic"},
    {"Www-Authenticate": "\u00e4"},
]
STATUS = [200] * 8 + [201, 204, 206, 301, 307, 400, 401, 403, 404, 405, 409, 416, 429, 500, 503]


class Server:
    """Answers by a function of method and path: status, headers, body."""

    def __init__(self) -> None:
        outer = self
        self.answer = lambda method, path: (404, {}, b"")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # a connection each, so that a lie about a length harms one answer only

            def handle_any(self) -> None:
                status, headers, body = outer.answer(self.command, self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_arguments: None  # a client that hung up
        self.url = f"oci://127.0.0.1:{self.server.server_port}/x"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("oras", reason="the extra `oci` is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_any_answer(hostile: Server, victim, tmp_path: Path) -> None:
    chance, store = random.Random(0), Store(tmp_path / "store")
    artifact = Store(tmp_path / "source").put(victim())
    entry = artifact.manifest.files[0]
    hostile.answer = lambda method, path: (chance.choice(STATUS), chance.choice(HEADERS), chance.choice(BODIES))
    errors = 0
    for _ in range(120):
        remote = from_url(hostile.url)
        for call in (
            remote.names,
            lambda r=remote: r.catalogue("acme/tone"),
            lambda r=remote: r.manifest("acme/tone", DIGEST),
            lambda r=remote: r.missing(artifact.manifest),
            lambda r=remote: r.write(artifact.manifest, entry, artifact.file(entry.path), lambda count: None),
            lambda r=remote: r.publish(artifact.manifest),
            lambda r=remote: r.yank("acme/tone", artifact.digest, "x"),
            lambda r=remote: pull(store, r, "acme/tone"),
        ):
            try:
                call()
            except HubError as error:
                errors += 1
                assert str(error)
                assert "\n" not in str(error)
    assert errors > 500
    assert store.list() == []


def served(manifest: Manifest, config: bytes | None = None):
    """Answers of a registry that holds one version, honestly but for `config`."""
    image = image_manifest(manifest.canonical)
    digest = canonical.digest(image)

    def answer(method: str, path: str):
        if path.endswith("tags/list?n=1000"):
            return 200, {}, json.dumps({"tags": [manifest.version]}).encode()
        if "/manifests/" in path:
            return 200, {"Docker-Content-Digest": digest}, image
        if path.endswith(manifest.digest):
            return 200, {}, manifest.canonical if config is None else config
        return 200, {}, b"z" * 2**22

    return answer


def test_more_bytes_than_announced(hostile: Server, victim, tmp_path: Path) -> None:
    manifest = Store(tmp_path / "source").put(victim()).manifest
    hostile.answer = served(manifest)
    with pytest.raises(HubError, match="more bytes than it should"):
        pull(Store(tmp_path / "store"), from_url(hostile.url), "acme/tone")
    hostile.answer = served(manifest, config=b" " * (canonical.MAX_JSON + 1))
    with pytest.raises(HubError, match="sends more than"):
        pull(Store(tmp_path / "store"), from_url(hostile.url), "acme/tone")
    assert Store(tmp_path / "store").list() == []


def test_a_registry_that_stumbles_is_asked_again(hostile: Server) -> None:
    from hub.clients.oci import Wire

    asked = []

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        asked.append(method)
        return 500 if len(asked) < fails else 201, {}, b""

    hostile.answer = answer
    wire = Wire(hostile.url.removeprefix("oci://").removesuffix("/x"), hostile.url)
    for fails, tries in ((2, 2), (99, 3)):
        asked.clear()
        if fails < tries + 1:
            wire.put("/v2/x/manifests/1.0", b"{}", "application/json", "1.0")
        else:
            with pytest.raises(HubError, match=r"refuses 1\.0 \(500\)"):
                wire.put("/v2/x/manifests/1.0", b"{}", "application/json", "1.0")
        assert asked == ["PUT"] * tries
