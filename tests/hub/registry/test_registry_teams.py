"""A registry for a team: private unless said otherwise; nobody waits for another, nobody sees the machine."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.errors import Conflict, UsageError
from hub.registry.errors import ApiError, without_paths
from hub.registry.limits import Limits
from hub.registry.tokens import add
from hub.registry.web import markdown
from hub.remotes import from_url
from hub.transfer import push


@pytest.fixture
def token_file(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "tokens.json"
    return path, add(path, "ann", read_scopes=(), write_scopes=("acme",))


def test_with_tokens_a_repository_is_private_unless_said_otherwise(serve, tmp_path: Path, packed, token_file) -> None:
    path, token = token_file
    with serve(tmp_path / "s", tokens=path) as site:
        site.store.put(packed("acme/put@1.0.0")[0])  # into the store itself, past the registry
        for name, body in (("plain", {}), ("open", {"private": False}), ("shut", {"private": True})):
            wanted = {"name": name, "organization": "acme", **body}
            assert site.ask("/api/repos/create", "POST", wanted, token=token).status == 200
        seen = {name: site.ask(f"/api/models/acme/{name}").status for name in ("put", "plain", "open", "shut")}
        assert seen == {"put": 401, "plain": 401, "open": 200, "shut": 401}
        assert [each["id"] for each in site.ask("/api/models").json()] == ["acme/open"]
        assert b"acme/put" not in site.ask("/", headers={"Accept": "text/html"}).body
        own = {each["id"]: each["private"] for each in site.ask("/api/models", token=token).json()}
        assert own == {"acme/put": True, "acme/plain": True, "acme/open": False, "acme/shut": True}
    with serve(tmp_path / "s", tokens=path, visibility="public") as site:
        seen = {name: site.ask(f"/api/models/acme/{name}").status for name in ("put", "plain", "open", "shut")}
        assert seen == {"put": 200, "plain": 401, "open": 200, "shut": 401}  # what was said stays said
    with serve(tmp_path / "t") as site:  # without tokens, there is nobody to hide it from
        site.ask("/api/repos/create", "POST", {"name": "plain", "organization": "acme"})
        assert site.ask("/api/models/acme/plain").json()["private"] is False


def test_push_private(serve, tmp_path: Path, store, publish, token_file, monkeypatch, online) -> None:
    path, token = token_file
    publish("acme/tone@1.0.0")
    publish("acme/other@1.0.0", seed=1)
    monkeypatch.setenv("HF_TOKEN", token)
    with serve(tmp_path / "s", tokens=path, visibility="public") as site:
        url = f"hf+{site.url}"
        remote = from_url(url)
        remote.keep_private()
        push(store, remote, "acme/tone")
        assert site.ask("/api/models/acme/tone").status == 401
        assert site.ask("/api/models/acme/tone", token=token).json()["private"] is True
        push(store, from_url(url), "acme/other")
        assert site.ask("/api/models/acme/other").json()["private"] is False
        publish("acme/other@1.1.0", seed=2)
        remote = from_url(url)
        remote.keep_private()
        with pytest.raises(Conflict, match="is public already, so nothing was sent"):
            push(store, remote, "acme/other")
        assert [release.version for release in site.store.catalogue("acme/other").releases] == ["1.0.0"]


def test_private_where_there_is_no_such_thing(store, publish, tmp_path: Path, monkeypatch) -> None:
    publish("acme/tone@1.0.0")
    monkeypatch.setenv("HUB_HOME", str(store.root))
    for words in (["--to", str(tmp_path / "remote")], ["--to", "oci://localhost:1/x"], ["--to", "memory://x"], []):
        result = CliRunner().invoke(main, ["push", "acme/tone", "--private", *words])
        assert result.exit_code == 2, words
        assert "hint:" in result.stderr
    assert not (tmp_path / "remote").exists()
    with pytest.raises(UsageError):
        from_url(str(tmp_path / "remote")).keep_private()


REFUSED = {
    "POST /api/repos/create": (b"", 401),
    "DELETE /api/repos/delete": (b"", 401),
    "POST /api/repos/move": (b"", 401),
    "PUT /api/models/acme/secret/settings": (b"", 401),
    "POST /api/models/acme/secret/branch/x": (b"", 401),
    "POST /api/models/acme/secret/tag/main": (b"", 401),
    "POST /api/models/acme/secret/preupload/main": (b"", 401),
    "POST /api/models/acme/secret/commit/main": (b"", 401),
    "POST /api/models/acme/secret/paths-info/main": (b"", 401),
    "POST /acme/secret.git/info/lfs/objects/batch": (b"", 401),
    "PUT /lfs/acme/secret/" + "0" * 64 + "?size=5&expires=9999999999&sig=x": (b"", 403),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_body_is_read_after_its_sender_is_known(guarded, what: str) -> None:
    """Who may not write is told so before a byte of what they announce has arrived."""
    guarded.ask("/api/repos/create", "POST", {"name": "secret", "organization": "acme", "private": True}, token="alice")
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as stream:
        stream.sendall(f"{what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n".encode())
        status = int(stream.recv(4096).split(b" ", 2)[1])
    assert status == REFUSED[what][1]


def test_a_body_that_does_not_come(small_site) -> None:
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", small_site.port), timeout=20) as stream:
        stream.sendall(b"POST /api/repos/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000\r\n\r\n{")
        for _ in range(4):
            time.sleep(0.2)
            stream.sendall(b" ")  # a little now and then does not help
        assert stream.recv(4096).split(b" ", 2)[1] == b"408"
    assert time.monotonic() - start < 15


N = markdown.MAX_RENDERED
WORST = {
    "brackets": "[" * N,
    "images": "![[" * N,
    "stars": "*a_" * N,
    "quotes": "> " * N,
    "ticks": "".join("`" * i + " " for i in range(1, 400)),
    "links": "[a](b" * N,
    "tables": "a|b\n-|-\n" + "x|y\n" * N,
    "headings": "a\n" * N,
    "entities": "&a" * N,
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_cards_are_rendered_in_bounded_time_and_once(name: str) -> None:
    start = time.monotonic()
    html = markdown.render(WORST[name], "/acme/tone/resolve/x")
    assert time.monotonic() - start < 60  # hundreds of times what a card takes, and what it took to no end before
    assert len(html) < 20 * N
    before = markdown.render.cache_info().hits
    assert markdown.render(WORST[name], "/acme/tone/resolve/x") is html
    assert markdown.render.cache_info().hits == before + 1


def test_a_card_that_is_cut_says_so() -> None:
    assert "the rest is in README.md" in markdown.render("word " * N, "/a")
    assert "the rest" not in markdown.render("word " * 100, "/a")


def test_no_answer_names_a_path_of_the_machine(site, files, send_directory, tag, packed, monkeypatch) -> None:
    root = str(site.store.root)

    def answers():
        send_directory(site, "acme/tone", files())
        directory = files("bad")
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "peft_type": "IA3"}')
        send_directory(site, "acme/bad", directory)
        yield tag(site, "acme/bad", "1.0.0")  # its files are looked at in a directory of the server
        (
            site.context.repos.drafts.blobs.directory
            / site.context.repos.resolve("acme/tone", "main").tree["README.md"].sha256
        ).unlink()
        yield site.ask("/acme/tone/resolve/main/README.md")
        site.store.put(packed("acme/put@1.0.0")[0])
        (site.store.root / "log.jsonl").write_bytes(b"{}\n")
        yield site.ask("/api/models/acme/put")
        (site.store.root / "log.jsonl").chmod(0)
        yield site.ask("/-/health")

    texts = []
    for answer in answers():
        text = answer.body.decode() + str(answer.headers)
        assert root not in text, text
        assert "/tmp/" not in text, text
        texts.append(answer.status)
    assert 400 in texts
    assert any(status >= 500 for status in texts)


def test_of_a_path_its_last_part_is_left() -> None:
    error = ApiError(
        400, "/srv/store/tmp/ab12/artifact/adapter_config.json: line 2; see /srv/store (/srv/store/x)", code="C"
    )
    plain = without_paths(error, [Path("/srv/store"), Path("/srv")])
    assert plain.message == "adapter_config.json: line 2; see the store (x)"
    assert plain.headers == {"X-Error-Message": plain.message, "X-Error-Code": "C"}
    assert without_paths(plain, [Path("/srv/store")]) is plain


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/acme/tone",
        "/acme/tone/tree/1.0.0",
        "/acme",
        "/-/health",
        "/api/models/acme/tone",
        "/api/models",
        "/favicon.ico",
    ],
)
def test_a_head_is_that_of_the_page(site, packed, path: str) -> None:
    site.store.put(packed("acme/tone@1.0.0")[0])
    head, whole = site.ask(path, "HEAD"), site.ask(path)
    assert (head.status, head.body) == (whole.status, b"")
    assert head.headers.get("content-type") == whole.headers.get("content-type")


def test_limits_are_options(tmp_path: Path) -> None:
    help_text = CliRunner().invoke(main, ["registry", "--help"]).output
    for option in ("--visibility", "--keep-drafts", "--max-connections"):
        assert option in help_text
    assert Limits().idle == 60.0
