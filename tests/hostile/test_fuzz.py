"""Everything that is read from outside, fed with what nobody would write: only HubErrors come out, each with a hint.

A few hundred examples run by default; ``pytest -m slow tests/hostile/test_fuzz.py`` runs 20,000.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hub.cli import _row_of
from hub.contents.tensor_files import read_header, scan
from hub.errors import HubError
from hub.foreign.peft_config import facts_of
from hub.manifest import Draft, Manifest
from hub.pack import check_directory, pack
from hub.project.lock import Lock, read_wishes
from hub.project.named_remotes import Remotes
from hub.ref import AdapterRef
from hub.relations.diff import flat
from hub.store import Store

TOTAL = 20_000  # examples of the slow run, over all targets
QUICK = 25  # examples of each target by default
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**53, 2**63, 2**200, 1e308, -1e-308, "", "..", "/etc/passwd", "\0", "sha256:", "é" * 9])
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Where in a document, what happens there, with what.
edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["set", "drop", "add", "twice"]), values), max_size=4)
# Where in a file, what happens there.
cuts = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "grow", "zero"]), st.binary(max_size=9)), max_size=4
)


def surgery(document: Any, changes: list[tuple[float, str, Any]]) -> Any:
    """A JSON document with a few places changed."""
    document = json.loads(json.dumps(document))
    for where, how, value in changes:
        places = list(walk(document))
        if not places:
            return value
        parent, key = places[min(int(where * len(places)), len(places) - 1)]
        if how == "set":
            parent[key] = value
        elif how == "drop":
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}{'' if how == 'twice' else 'x'}"] = value
        else:
            parent.insert(key, parent[key] if how == "twice" else value)
    return document


def walk(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from walk(document[key])


def mangle(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """Bytes with a few places changed."""
    found = bytearray(data)
    for where, how, piece in changes:
        at = int(where * len(found))
        if how == "flip" and found:
            found[min(at, len(found) - 1)] ^= (piece[:1] or b"\1")[0] or 1
        elif how == "cut":
            del found[at : at + max(len(piece), 1)]
        elif how == "grow":
            found[at:at] = piece
        elif how == "zero":
            found[at : at + len(piece)] = bytes(len(piece))
    return bytes(found)


def dumps(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")  # NaN and lone surrogates as they are


# -- what is read --------------------------------------------------------------------------------------------------


class Ground:
    """A sound artifact, a sound store and a registry over it, in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = root / "tone"
        self.directory.mkdir()
        values = np.arange(64, dtype=np.float32).reshape(8, 8)
        tensors = {"q.lora_A.weight": values[:2], "q.lora_B.weight": values[:, :2].copy()}
        save_file(tensors, self.directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (self.directory / "adapter_config.json").write_text('{"lora_alpha": 8, "peft_type": "LORA", "r": 2}')
        (self.directory / "README.md").write_text("# tone\n")
        metric = {"dataset": "d", "metric": "accuracy", "value": 0.5}
        lineage = {"parents": ["acme/root@1.0"], "run": "x"}
        facts: dict[str, Any] = {"kind": "lora", "metrics": (metric,), "lineage": lineage, "labels": ("a", "b")}
        requires = ({"name": "acme/other", "range": ">=1,<2"},)
        self.manifest = pack(self.directory, Draft(name="acme/tone", version="1.0.0", requires=requires, **facts))
        self.document = json.loads(self.manifest.canonical)
        self.weights = (self.directory / "adapter_model.safetensors").read_bytes()
        length = int.from_bytes(self.weights[:8], "little")
        self.header = json.loads(self.weights[8 : 8 + length])
        self.body = self.weights[8 + length :]
        self.store = Store(root / "store")
        self.store.put(self.directory)
        self.store.tag("acme/tone@1.0.0", "prod")
        self.log = (self.store.root / "log.jsonl").read_bytes()
        self.place = root / "file"
        self._app: Any = None

    def file(self, data: bytes) -> Path:
        self.place.write_bytes(data)
        return self.place

    def app(self) -> Any:
        if self._app is None:
            pytest.importorskip("fastapi", reason="the extra `server` is not installed")
            from hub.registry.app import create_app

            self._app = create_app(self.store)
        return self._app


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        yield Ground(Path(place))


def manifests(ground: Ground, changes: Any) -> None:
    manifest = Manifest.parse(dumps(surgery(ground.document, changes)))
    assert Manifest.parse(manifest.canonical).digest == manifest.digest
    for entry in manifest.files:
        assert Path(os.path.normpath(f"/place/{entry.path}")).is_relative_to("/place")


def manifest_bytes(ground: Ground, changes: Any) -> None:
    Manifest.parse(mangle(ground.manifest.canonical, changes))


def refs(_ground: Ground, text: str) -> None:
    ref = AdapterRef.parse(text)
    assert AdapterRef.parse(str(ref)) == ref
    assert "/" not in ref.name
    assert ".." not in f"{ref.namespace}/{ref.name}"


def headers(ground: Ground, changes: Any) -> None:
    raw = dumps(surgery(ground.header, changes))
    scan(ground.file(len(raw).to_bytes(8, "little") + raw + ground.body))


def weights(ground: Ground, changes: Any) -> None:
    path = ground.file(mangle(ground.weights, changes))
    read_header(path)
    scan(path)


def directories(ground: Ground, case: Any) -> None:
    """A whole artifact directory with one file changed, as it comes out of an archive or a checkout."""
    name, changes = case
    path = ground.directory / name
    good = path.read_bytes()
    try:
        path.write_bytes(mangle(good, changes))
        check_directory(ground.directory)
        assert path.read_bytes() == good or name == "module.json"
    finally:
        path.write_bytes(good)


def paths(ground: Ground, path: str) -> None:
    document = {**ground.document, "files": [{"path": path, "sha256": "0" * 64, "size": 1}], "tensors": []}
    manifest = Manifest.parse(dumps(document))
    assert Path(os.path.normpath(f"/place/{manifest.files[0].path}")).is_relative_to("/place")


def configs(ground: Ground, changes: Any) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q"], "use_dora": True}
    place = ground.root / "config"
    place.mkdir(exist_ok=True)
    document = surgery(config, changes)
    (place / "adapter_config.json").write_bytes(dumps(document))
    flat(facts_of(place))


def logs(ground: Ground, changes: Any) -> None:
    """The log of a store or of a directory remote; the index is there, and is made anew."""
    path = ground.store.root / "log.jsonl"
    try:
        path.write_bytes(mangle(ground.log, changes))
        store = Store(ground.store.root)
        for artifact in store.list(yanked=True):
            assert artifact.manifest.digest == artifact.digest
        list(store.ledger.read())
        store.verify()
    finally:
        path.write_bytes(ground.log)


def indexes(ground: Ground, changes: Any) -> None:
    """index.sqlite is derived: whatever is in it, the store answers rightly."""
    path = ground.store.root / "index.sqlite"

    def forget(*suffixes: str) -> None:
        for suffix in suffixes:
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    Store(ground.store.root).list()
    try:
        path.write_bytes(mangle(path.read_bytes(), changes))
        forget("-wal", "-shm")
        Store(ground.store.root).list(text="tone")
        Store(ground.store.root).catalogue("acme/tone")
    finally:
        forget("", "-wal", "-shm")


def locks(ground: Ground, changes: Any) -> None:
    pin = {"name": "acme/tone", "version": "1.0.0", "digest": ground.manifest.digest}
    document = {"requires": {"acme/tone>=1": ground.manifest.digest}, "artifacts": [pin], "schema_version": 1}
    Lock.load(ground.file(dumps(surgery(document, changes))))


def named_remotes(ground: Ground, changes: Any) -> None:
    (ground.root / "remotes.json").write_bytes(dumps(surgery({"team": "/mnt/x", "hub": "hf://acme"}, changes)))
    assert all(isinstance(url, str) for url in Remotes(ground.root).all().values())


def wishes(ground: Ground, changes: Any) -> None:
    place = ground.root / "project"
    place.mkdir(exist_ok=True)
    (place / "modules.yaml").write_bytes(mangle(b'requires: ["acme/tone>=1,<2", &a x]\nfrom: s3://bucket/x\n', changes))
    read_wishes(place)


def requests(ground: Ground, case: Any) -> None:
    """HTTP requests to the registry, in this process: a refusal is one sentence, and nothing is its own fault."""
    method, path, body, kind = case
    status, headers = asyncio.run(ask(ground.app(), method, path, body, kind))
    assert status < 500, (method, path, body)
    if status >= 400 and method != "HEAD" and path.startswith("/api/"):
        assert headers.get("x-error-message"), (method, path, body)


async def ask(app: Any, method: str, path: str, body: bytes, kind: str) -> tuple[int, dict[str, str]]:
    """One request to an ASGI application, with no server between."""
    sent: list[dict[str, Any]] = []
    blocks = [body[i : i + 100] for i in range(0, len(body), 100)] or [b""]

    async def receive() -> dict[str, Any]:
        if not blocks:
            return {"type": "http.disconnect"}
        block = blocks.pop(0)
        return {"type": "http.request", "body": block, "more_body": bool(blocks)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    target, _, query = path.partition("?")
    headers = [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"}
    scope |= {
        "path": target,
        "raw_path": target.encode("utf-8", "replace"),
        "query_string": query.encode(),
        "root_path": "",
    }
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {}}
    await app(scope, receive, send)
    start = next(message for message in sent if message["type"] == "http.response.start")
    return start["status"], {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}


COMMIT = [
    {"key": "header", "value": {"summary": "x", "parentCommit": "0" * 40}},
    {"key": "file", "value": {"content": "eA==", "path": "a.txt", "encoding": "base64"}},
    {"key": "lfsFile", "value": {"path": "b.txt", "algo": "sha256", "oid": "0" * 64, "size": 3}},
    {"key": "deletedFile", "value": {"path": "c.txt"}},
]
BODIES: dict[str, tuple[str, Any]] = {
    "/api/repos/create": ("POST", {"name": "tone", "organization": "acme", "type": "model", "private": True}),
    "/api/validate-yaml": ("POST", {"content": "---\nlicense: mit\n---\n", "repoType": "model"}),
    "/api/models/acme/tone/preupload/main": ("POST", {"files": [{"path": "a.txt", "size": 3, "sample": "eA=="}]}),
    "/api/models/acme/tone/commit/main": ("POST", COMMIT),
    "/api/models/acme/tone/tag/main": ("POST", {"tag": "1.1.0", "message": "x"}),
    "/api/models/acme/tone/paths-info/main": ("POST", {"paths": ["README.md", "../x"], "expand": True}),
    "/acme/tone.git/info/lfs/objects/batch": (
        "POST",
        {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 3}]},
    ),
    "/api/models/acme/tone/tree/main?recursive=true": ("GET", {}),
    "/acme/tone/resolve/main/README.md": ("GET", {}),
    "/?q=tone&sort=accuracy&page=2": ("GET", {}),
}
WORDS = [
    "acme",
    "tone",
    "1.0.0",
    ">=1",
    "@prod",
    "@sha256:",
    "@",
    "/",
    "~",
    ",",
    "<",
    "=",
    "!",
    "..",
    "--",
    "é",
    "\x00",
]
names = st.sampled_from([*WORDS, "\n", "1e9", "latest"]) | st.text(max_size=6)


@st.composite
def http(draw: Any) -> tuple[str, str, bytes, str]:
    path = draw(st.sampled_from(sorted(BODIES)))
    method, document = BODIES[path]
    changed = surgery(document, draw(edits))
    newline = isinstance(document, list) and isinstance(changed, list)
    body = b"".join(dumps(line) + b"\n" for line in changed) if newline else dumps(changed)
    if draw(st.booleans()):
        body = mangle(body, draw(cuts))
    if draw(st.integers(0, 3)) == 0:
        path = mangle(path.encode(), draw(cuts)).decode("utf-8", "replace")
        path = path if path.startswith("/") else f"/{path}"
    method = draw(st.sampled_from([method, method, method, "PUT", "DELETE", "HEAD"]))
    return method, path, body, draw(st.sampled_from(["application/json", "application/x-ndjson", "text/x"]))


FILES = st.sampled_from(["adapter_model.safetensors", "adapter_config.json", "module.json", "README.md"])
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Ground, Any], None]]] = {
    "manifests": (edits, manifests),
    "manifest bytes": (cuts, manifest_bytes),
    "refs": (st.lists(names, max_size=6).map("".join), refs),
    "safetensors headers": (edits, headers),
    "safetensors bytes": (cuts, weights),
    "directories": (st.tuples(FILES, cuts), directories),
    "paths": (st.lists(names, max_size=8).map("/".join) | st.text(max_size=40), paths),
    "configs": (edits, configs),
    "logs": (cuts, logs),
    "indexes": (cuts, indexes),
    "locks": (edits, locks),
    "named remotes": (edits, named_remotes),
    "wishes": (cuts, wishes),
    "http requests": (http(), requests),
}


def feed(ground: Ground, name: str, examples: int) -> int:
    """Run one target; gives the number of inputs that were refused."""
    strategy, target = TARGETS[name]
    refused = 0

    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    @given(strategy)
    def run(case: Any) -> None:
        nonlocal refused
        try:
            target(ground, case)
        except HubError as error:
            refused += 1
            assert str(error)
            row = _row_of(error)
            assert error.hint or (row and row.hint), f"{type(error).__name__} without a hint: {error}"

    run()
    return refused


@pytest.mark.parametrize("name", TARGETS)
def test_only_hub_errors_come_out(name: str, ground: Ground) -> None:
    feed(ground, name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_twenty_thousand(name: str, ground: Ground) -> None:
    share = -(-TOTAL // len(TARGETS))
    refused = feed(ground, name, share)
    assert refused or name in ("indexes", "http requests")  # an index is made anew, HTTP answers by itself
