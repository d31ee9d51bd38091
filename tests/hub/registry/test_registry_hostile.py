"""Hostile HTTP: bodies, paths, headers. The server refuses in one sentence, keeps nothing and goes on."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.registry.errors import ApiError, header_text
from hub.registry.limits import Limits
from hub.registry.state.commit_stream import Operation, read_commit

HEADER = {"key": "header", "value": {"summary": "x"}}


def lines(*entries) -> bytes:
    return b"".join((e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n" for e in entries)


def one(path: str = "a.txt", content: str = "eA==", **more) -> dict:
    return {"key": "file", "value": {"content": content, "path": path, "encoding": "base64", **more}}


@pytest.fixture
def repo(site):
    assert site.ask("/api/repos/create", "POST", {"name": "tone", "organization": "acme"}).status == 200
    return site


@pytest.fixture(scope="module")
def refusing(serve, tmp_path_factory):
    """One server for all requests that must leave it as it was."""
    with serve(tmp_path_factory.mktemp("refusing")) as found:
        assert found.ask("/api/repos/create", "POST", {"name": "tone", "organization": "acme"}).status == 200
        yield found


def untouched(site) -> bool:
    blobs = list((site.store.root / "registry" / "blobs" / "sha256").iterdir())
    staged = (
        list((site.store.root / "registry" / "tmp").iterdir()) if (site.store.root / "registry/tmp").exists() else []
    )
    return not blobs and not staged and site.ask("/api/models/acme/tone").json()["siblings"] == []


COMMITS = {
    "nothing": b"",
    "blank": b"\n\n",
    "no header": lines(one()),
    "not JSON": lines(HEADER, b"{"),
    "not an object": lines(HEADER, b"[]"),
    "no value": lines(HEADER, {"key": "file"}),
    "value is text": lines(HEADER, {"key": "file", "value": "x"}),
    "unknown key": lines(HEADER, {"key": "copyFile", "value": {"path": "a.txt"}}),
    "two headers": lines(HEADER, HEADER),
    "key twice": lines(HEADER, b'{"key":"file","key":"header","value":{}}'),
    "not UTF-8": lines(HEADER, b'{"key":"file","value":{"path":"\xff","content":"eA=="}}'),
    "NUL in JSON": lines(HEADER, b'{"key":"file\x00"}'),
    "deep JSON": lines(HEADER, b'{"key":"file","value":' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "no content": lines(HEADER, {"key": "file", "value": {"path": "a.txt"}}),
    "content is a number": lines(HEADER, {"key": "file", "value": {"path": "a.txt", "content": 5}}),
    "two contents": lines(HEADER, b'{"key":"file","value":{"content":"eA==","content":"eA==","path":"a.txt"}}'),
    "not base64": lines(HEADER, one(content="@@@@")),
    "half base64": lines(HEADER, one(content="eA=")),
    "bytes after padding": lines(HEADER, one(content="eA==eA==")),
    "other encoding": lines(HEADER, one(encoding="utf-8")),
    "ends in content": lines(HEADER) + b'{"key":"file","value":{"content":"eA==',
    "ends in a string": lines(HEADER) + b'{"key":"fi',
    "newline in a string": lines(HEADER, b'{"key":"fi\nle"}'),
    "bad pointer": lines(HEADER, {"key": "lfsFile", "value": {"path": "a.txt", "oid": "xyz"}}),
    "pointer to nothing": lines(HEADER, {"key": "lfsFile", "value": {"path": "a.txt", "oid": "0" * 64}}),
    "negative size": lines(HEADER, {"key": "lfsFile", "value": {"path": "a.txt", "oid": "0" * 64, "size": -1}}),
    "other algorithm": lines(HEADER, {"key": "lfsFile", "value": {"path": "a.txt", "algo": "md5", "oid": "0" * 64}}),
    "bad parent": lines({"key": "header", "value": {"summary": "x", "parentCommit": "../../x"}}),
    "endless summary": lines({"key": "header", "value": {"summary": "x" * 9000}}),
}


@pytest.mark.parametrize("name", sorted(COMMITS))
def test_malformed_commits(refusing, name) -> None:
    answer = refusing.ask("/api/models/acme/tone/commit/main", "POST", COMMITS[name])
    assert answer.status == 400, answer.body
    assert answer.json()["error"]
    assert untouched(refusing)


@pytest.mark.parametrize(
    "path",
    [
        "../x.txt", "/etc/passwd.txt", "a/../../x.txt", "a/./x.txt", "./x.txt", "a//x.txt", "..\\x.txt", "C:x.txt",
        ".x.txt", "a\x00.txt", "a\n.txt", "a/", "", "x" * 300 + ".txt", "a/" * 30 + "x.txt", "~/x.txt", "%2e%2e/x.txt",
        "\u202ex.txt", "con./x.txt", "x.txt/", "x .txt ",
    ],
)  # fmt: skip
def test_paths_that_escape(refusing, path) -> None:
    answer = refusing.ask("/api/models/acme/tone/commit/main", "POST", lines(HEADER, one(path)))
    assert answer.status == 400, answer.body
    asked = {"files": [{"path": path, "size": 1}]}
    assert refusing.ask("/api/models/acme/tone/preupload/main", "POST", asked).status == 400
    assert untouched(refusing)


@pytest.mark.parametrize(
    "path",
    [
        "/acme/tone/resolve/main/../../../../etc/passwd",
        "/acme/tone/resolve/main/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/acme/tone/resolve/main/..%2f..%2f..%2fetc%2fpasswd",
        "/acme/tone/resolve/..%2f..%2fx/README.md",
        "/acme/..%2f..%2fetc/resolve/main/passwd",
        "/..%2f..%2f/tone/resolve/main/x",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/acme/tone/resolve/main//etc/passwd",
        "/api/models/acme/tone/tree/main/..%2f..",
    ],
)
def test_reading_outside(refusing, path) -> None:
    answer = refusing.ask(path)
    assert answer.status in (400, 404), answer.body
    assert b"root:" not in answer.body and b"FastAPI" not in answer.body


@pytest.mark.parametrize("path", ["/%ff", "/acme/%00", "/acme/to%0d%0aX-Evil:1", "/%c0%ae%c0%ae/x", "/a%1bb"])
def test_paths_that_are_no_text(refusing, path) -> None:
    assert refusing.ask(path).status == 400


def test_no_header_can_be_injected(repo) -> None:
    for text in ("a\r\nX-Evil: 1", "käse\r\n\r\n<html>", "\u2028x", "x" * 5000):
        asked = {"files": [{"path": text, "size": 1}]}
        answer = repo.ask("/api/models/acme/tone/preupload/main", "POST", asked)
        assert answer.status == 400
        assert "x-evil" not in answer.headers
        assert len(answer.headers["x-error-message"]) <= 400
        assert answer.headers["x-error-message"] == header_text(answer.headers["x-error-message"])


def test_limits(small_site) -> None:
    ask = small_site.ask
    ask("/api/repos/create", "POST", {"name": "tone", "organization": "acme"})
    big = base64.b64encode(b"x" * 2001).decode()
    fits = base64.b64encode(b"x" * 1998).decode()
    cases = {
        "inline": lines(HEADER, one(content=big)),
        "commit": lines(
            HEADER, *[one(f"{i}.txt", fits) for i in range(51)][:50], *[one(f"b{i}.txt", fits) for i in range(2)]
        ),
        "operations": lines(HEADER, *[one(f"{i}.txt") for i in range(51)]),
        "JSON": lines({"key": "header", "value": {"summary": "x", "more": "y" * 21_000}}),
        "JSON string": lines(HEADER) + b'{"key":"' + b"x" * 30_000,
    }
    for name, body in cases.items():
        answer = ask("/api/models/acme/tone/commit/main", "POST", body)
        assert answer.status == 413, (name, answer.body)
    assert ask("/api/repos/create", "POST", b"x" * 20_001).status == 413
    assert ask("/api/repos/create", "POST", iter([b"x" * 15_000] * 3)).status == 413  # chunked: no length announced
    batch = {"operation": "upload", "objects": [{"oid": "a" * 64, "size": 64_001}]}
    answer = ask("/acme/tone.git/info/lfs/objects/batch", "POST", batch).json()
    assert answer["objects"][0]["error"]["code"] == 413
    assert untouched(small_site)


def test_large_uploads_are_what_they_were_announced_as(small_site) -> None:
    import hashlib

    ask = small_site.ask
    ask("/api/repos/create", "POST", {"name": "tone", "organization": "acme"})
    data = b"law\n" * 1000
    oid = hashlib.sha256(data).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    action = ask("/acme/tone.git/info/lfs/objects/batch", "POST", batch).json()["objects"][0]["actions"]["upload"]
    href = action["href"].removeprefix(small_site.url)
    for wrong in (data[:-1], data + b"x", b"y" * len(data), b""):
        assert ask(href, "PUT", wrong).status == 400
    assert untouched(small_site)
    assert ask(href, "PUT", data).status == 200
    again = ask("/acme/tone.git/info/lfs/objects/batch", "POST", batch).json()["objects"][0]
    assert "actions" in again  # uploaded, but in no revision: asking again costs little, and tells nothing
    pointer = {"key": "lfsFile", "value": {"path": "a.txt", "algo": "sha256", "oid": oid, "size": len(data) - 1}}
    assert ask("/api/models/acme/tone/commit/main", "POST", lines(HEADER, pointer)).status == 400
    pointer["value"]["size"] = len(data)
    assert ask("/api/models/acme/tone/commit/main", "POST", lines(HEADER, pointer)).status == 200
    assert ask("/acme/tone/resolve/main/a.txt").body == data


@pytest.mark.parametrize("objects", [None, {}, [1], [{"oid": "x", "size": 1}], [{"oid": "a" * 64, "size": "1"}],
                                     [{"oid": "a" * 64, "size": -1}], [{"oid": "a" * 64, "size": True}]])  # fmt: skip
def test_malformed_batches(refusing, objects) -> None:
    batch = {"operation": "upload", "objects": objects}
    assert refusing.ask("/acme/tone.git/info/lfs/objects/batch", "POST", batch).status == 422
    assert refusing.ask("/acme/tone.git/info/lfs/objects/batch", "POST", {"operation": "download"}).status == 422


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a": NaN}', b'{"a":1,"a":2}', b"\xff", b'"x"', b"[" * 5000])
def test_malformed_json(refusing, body) -> None:
    for path in ("/api/repos/create", "/api/models/acme/tone/preupload/main", "/api/models/acme/tone/tag/main"):
        assert refusing.ask(path, "POST", body).status == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # DNS rebinding: a page's own name leading to this machine
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": ""}, 400),
        ({"Host": "a b"}, 400),
        ({"Host": "127.0.0.1/x"}, 400),
    ],
)
def test_hosts(refusing, headers, status) -> None:
    assert refusing.ask("/-/health", headers=headers).status == status


def test_other_sites_pages_cannot_write(repo) -> None:
    made = {"name": "x", "organization": "acme"}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert repo.ask("/api/repos/create", "POST", made, headers).status == 403
        assert repo.ask("/api/models", headers=headers).status == 200
    assert repo.ask("/api/repos/create", "POST", made, {"Origin": repo.url}).status == 200


def test_files_run_nowhere(repo, send_commit) -> None:
    page = b"<script>alert(1)</script>"
    send_commit(repo, "acme/tone", {"README.md": page, "x.json": page, "y.txt": page})
    for name in ("README.md", "x.json", "y.txt"):
        answer = repo.ask(f"/acme/tone/resolve/main/{name}")
        assert answer.headers["content-type"].split(";")[0] in ("text/plain", "application/json")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["content-disposition"].startswith("attachment")


def test_ranges_and_entity_tags(repo, send_commit) -> None:
    data = bytes(range(256)) * 40
    send_commit(repo, "acme/tone", {"x.safetensors": data})
    path = "/acme/tone/resolve/main/x.safetensors"
    head = repo.ask(path, "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(data))
    assert head.headers["accept-ranges"] == "bytes"
    assert len(head.headers["etag"]) == 66 and len(head.headers["x-repo-commit"]) == 40
    assert "x-xet-hash" not in head.headers
    part = repo.ask(path, headers={"Range": "bytes=100-199"})
    assert (part.status, part.body) == (206, data[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(data)}"
    assert repo.ask(path, headers={"Range": "bytes=10000-"}).body == data[10000:]
    assert repo.ask(path, headers={"Range": "bytes=-5"}).body == data[-5:]
    assert repo.ask(path, headers={"Range": "bytes=999999-"}).status == 416
    assert repo.ask(path, headers={"Range": "bytes=x"}).status in (200, 400)
    assert repo.ask(path, headers={"Range": "bytes=" + ",".join(["0-1"] * 5000)}).status in (200, 206, 400, 416)
    fresh = repo.ask(path, headers={"If-None-Match": head.headers["etag"]})
    assert (fresh.status, fresh.body) == (304, b"")


def test_broken_requests_do_not_stop_the_server(repo) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00",  # TLS to a plain port
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /api/repos/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/repos/create HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    ):
        repo.raw(data)
    assert repo.ask("/-/health").status == 200


def test_an_upload_that_is_cut_off_leaves_nothing(repo, body) -> None:
    whole = body({"a.txt": b"law\n" * 50_000})
    head = f"POST /api/models/acme/tone/commit/main HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(whole)}\r\n\r\n"
    for cut in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        with socket.create_connection(("127.0.0.1", repo.port)) as stream:
            stream.sendall(head.encode() + whole[:cut])
        deadline = time.monotonic() + 10
        while not untouched(repo):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert repo.ask("/api/models/acme/tone/commit/main", "POST", whole).status == 200


def test_a_stalled_upload_is_given_up_and_blocks_nobody(small_site) -> None:
    ask = small_site.ask
    ask("/api/repos/create", "POST", {"name": "tone", "organization": "acme"})
    head = b"POST /api/models/acme/tone/commit/main HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{"
    streams = [socket.create_connection(("127.0.0.1", small_site.port)) for _ in range(70)]
    try:
        for stream in streams:
            stream.sendall(head)
        start = time.monotonic()
        assert ask("/api/models/acme/tone").status == 200
        assert time.monotonic() - start < 5
        streams[0].settimeout(20)
        assert b" 408 " in streams[0].recv(300)
    finally:
        for stream in streams:
            stream.close()


# -- the commit reader by itself -------------------------------------------------------------------------------------


def chunked(data: bytes, sizes: list[int]):
    stream = io.BytesIO(data)
    for size in sizes:
        yield stream.read(size)
    while part := stream.read(7919):
        yield part


FILES = st.dictionaries(
    st.sampled_from(["a.txt", "b/c.txt", "d.json", "e.safetensors"]), st.binary(max_size=300), min_size=1
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES, sizes=st.lists(st.integers(0, 40), max_size=60), slashes=st.booleans(), spaces=st.booleans())
def test_commits_read_back_however_they_are_cut(tmp_path, files, sizes, slashes, spaces) -> None:
    room = tmp_path
    for left in room.iterdir():
        left.unlink()
    text = []
    for path, data in files.items():
        line = json.dumps(one(path, base64.b64encode(data).decode()), separators=None if spaces else (",", ":"))
        text.append(line.replace("/", "\\/") if slashes else line)  # as some JSON writers do
    body = lines(HEADER, *[line.encode() for line in text])
    found = read_commit(chunked(body, sizes), room, Limits())
    assert [operation.path for operation in found.operations] == list(files)
    for operation in found.operations:
        assert isinstance(operation, Operation) and operation.staged is not None and operation.file is not None
        assert operation.staged.read_bytes() == files[operation.path]
        assert operation.file.size == len(files[operation.path])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "path": st.text(max_size=12) | ANYTHING,
        "content": st.text(max_size=12) | ANYTHING,
        "encoding": st.sampled_from(["base64", "utf-8"]) | ANYTHING,
        "oid": st.text("0123456789abcdef", min_size=64, max_size=64) | ANYTHING,
        "size": st.integers() | ANYTHING,
        "summary": ANYTHING,
        "parentCommit": ANYTHING,
    },
)
KEYS = st.sampled_from(["header", "file", "lfsFile", "deletedFile", "deletedFolder"]) | st.text(max_size=8)
ENTRIES = st.lists(st.fixed_dictionaries({"key": KEYS, "value": VALUES | ANYTHING}), max_size=5)


BODIES = {
    "entries": ENTRIES,
    "junk": st.binary(max_size=60),
    "at": st.integers(0, 10**6),
    "sizes": st.lists(st.integers(0, 30), max_size=20),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**BODIES)
def test_any_other_body_is_refused_in_a_sentence(tmp_path, entries, junk, at, sizes) -> None:
    refuse_or_read(tmp_path, entries, junk, at, sizes)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(**BODIES)
def test_twenty_thousand_other_bodies(tmp_path, entries, junk, at, sizes) -> None:
    refuse_or_read(tmp_path, entries, junk, at, sizes)


def refuse_or_read(room: Path, entries, junk, at, sizes) -> None:
    body = lines(HEADER, *entries)
    body = body[: at % len(body)] + junk + body[at % len(body) :]
    for left in room.iterdir():
        left.unlink()
    try:
        found = read_commit(chunked(body, sizes), room, Limits(json=5000, inline=1000))
    except ApiError as error:
        assert error.status in (400, 413) and error.message
    else:
        for operation in found.operations:
            assert ".." not in Path(operation.path).parts and not operation.path.startswith("/")


def test_memory_stays_flat_however_large_the_file(tmp_path: Path) -> None:
    import tracemalloc

    block = base64.b64encode(bytes(3 * 2**18))

    def body():
        yield lines(HEADER) + b'{"key":"file","value":{"content":"'
        for _ in range(128):  # 96 MiB of file
            yield block
        yield b'","path":"x.safetensors","encoding":"base64"}}\n'

    tracemalloc.start()
    found = read_commit(body(), tmp_path, Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.operations[0].file is not None and found.operations[0].file.size == 128 * 3 * 2**18
    assert peak < 12 * 2**20


def test_readers_are_served_while_many_write(repo, body) -> None:
    """64 writers and readers at once: every answer is right, none is a failure of the server."""
    failures: list[object] = []

    def work(index: int) -> None:
        name = f"acme/a{index % 8}"
        repo.ask("/api/repos/create", "POST", {"name": f"a{index % 8}", "organization": "acme"})
        data = f"{index}\n".encode() * 100
        answer = repo.ask(f"/api/models/{name}/commit/main", "POST", body({f"{index}.txt": data}))
        back = repo.ask(f"/{name}/resolve/main/{index}.txt")
        if answer.status != 200 or back.body != data:
            failures.append((answer, back.status))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    for index in range(8):  # no commit was lost: each of the 8 repositories holds the files of its 8 writers
        assert len(repo.ask(f"/api/models/acme/a{index}").json()["siblings"]) == 8
