"""Tokens and private repositories: who may see and change what, answered as the real hub answers."""

from __future__ import annotations

import json
import sqlite3
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.errors import NotFound, StoreError, UsageError
from hub.registry import tokens
from hub.registry.commands import registry
from hub.registry.errors import ApiError
from hub.registry.state.drafts import Drafts, Repo, find_repo, version_tags

PROBE = """
import huggingface_hub.errors as errors
def kind(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
"""


@pytest.fixture
def secret(guarded, files, send_directory, tag):
    """acme/secret is private, with version 1.0.0; acme/open is public."""
    for name, visibility in (("secret", "private"), ("open", "public")):
        wanted = {"name": name, "organization": "acme", "visibility": visibility}
        assert guarded.ask("/api/repos/create", "POST", wanted, token="alice").status == 200
        send_directory(guarded, f"acme/{name}", files("tone"), token="alice")
        assert tag(guarded, f"acme/{name}", "1.0.0", token="alice").status == 200
    return guarded


READS = (
    PROBE
    + """
print(json.dumps([
    kind(lambda: api.model_info("acme/secret").id),
    kind(lambda: api.list_repo_files("acme/secret")[0]),
    kind(lambda: len(api.list_repo_refs("acme/secret").tags)),
    kind(lambda: __import__("os").path.basename(hf_hub_download("acme/secret", "README.md", revision="1.0.0"))),
    kind(lambda: __import__("os").path.exists(snapshot_download("acme/secret"))),
    kind(lambda: api.file_exists("acme/secret", "README.md")),
    kind(lambda: [m.id for m in api.list_models()]),
    kind(lambda: api.model_info("acme/open").id),
]))
"""
)


@pytest.mark.parametrize(
    ("token", "missing"), [(None, ["RepositoryNotFoundError", 401]), ("bob", ["RepositoryNotFoundError", 404])]
)
def test_a_private_repository_is_not_there_for_others(secret, token, missing) -> None:
    assert secret.stock(READS, token=token) == [missing] * 5 + [False, ["acme/open"], "acme/open"]


@pytest.mark.parametrize("token", ["alice", "reader", "root"])
def test_a_private_repository_is_there_for_its_readers(secret, token) -> None:
    both = ["acme/open", "acme/secret"]
    expected = ["acme/secret", "README.md", 1, "README.md", True, True, both, "acme/open"]
    assert secret.stock(READS, token=token) == expected


def test_a_wrong_token_is_refused_even_for_what_is_public(secret) -> None:
    found = secret.stock(PROBE + 'print(json.dumps(kind(lambda: api.model_info("acme/open").id)))', token="mlm_wrong")
    assert found == ["HfHubHTTPError", 401]


WRITES = (
    PROBE
    + """
upload = lambda name: api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id=name)
print(json.dumps([
    kind(lambda: upload("acme/open")),
    kind(lambda: upload("acme/secret")),
    kind(lambda: api.create_tag("acme/open", tag="2.0.0")),
    kind(lambda: api.delete_tag("acme/open", tag="1.0.0")),
    kind(lambda: api.delete_repo("acme/open")),
    kind(lambda: api.create_repo("acme/more")),
    kind(lambda: api.update_repo_settings("acme/open", private=True)),
    kind(lambda: api.create_branch("acme/open", branch="mine")),
]))
"""
)


@pytest.mark.parametrize(
    ("token", "public", "private"),
    [
        (None, ["HfHubHTTPError", 401], ["RepositoryNotFoundError", 401]),
        ("bob", ["HfHubHTTPError", 403], ["RepositoryNotFoundError", 404]),
        ("reader", ["HfHubHTTPError", 403], ["HfHubHTTPError", 403]),
    ],
)
def test_writing_needs_the_namespace(secret, token, public, private) -> None:
    before = secret.context.repos.refs("acme/open")
    assert secret.stock(WRITES, token=token) == [public, private, *[public] * 6]
    assert secret.context.repos.refs("acme/open") == before


def test_whoami_and_the_home_namespace(guarded) -> None:
    found = guarded.stock(
        """
me = api.whoami()
print(json.dumps([me["name"], me["auth"]["accessToken"]["role"], [o["name"] for o in me["orgs"]],
    api.create_repo("tone").repo_id]))
""",
        token="alice",
    )
    assert found == ["acme", "write", ["acme"], "acme/tone"]
    assert guarded.ask("/api/whoami-v2").status == 401
    assert guarded.ask("/api/whoami-v2", token="reader").json()["auth"]["accessToken"]["role"] == "read"


def test_a_gated_repository_shows_its_page_but_not_its_files(secret) -> None:
    found = secret.stock(
        PROBE
        + """
api.update_repo_settings("acme/open", gated="manual")
anyone, bob = HfApi(token=False), None
print(json.dumps([
    kind(lambda: anyone.model_info("acme/open").gated),
    kind(lambda: anyone.hf_hub_download("acme/open", "README.md", cache_dir="/tmp/never")),
    kind(lambda: anyone.file_exists("acme/open", "README.md")),
    kind(lambda: anyone.auth_check("acme/open")),
    kind(lambda: api.auth_check("acme/open", write=True)),
]))
""",
        token="alice",
    )
    gated = ["GatedRepoError", 401]
    assert found == ["manual", gated, gated, gated, None]
    path = "/acme/open/resolve/main/README.md"
    assert secret.ask(path, token="bob").status == 403
    assert secret.ask(path, token="bob").headers["x-error-code"] == "GatedRepo"
    assert secret.ask(path, token="reader").status == 200


def test_hashes_open_no_doors(secret, files) -> None:
    """Whoever knows the sha256 of a private file must not get it by linking it into a repository of their own."""
    sha256 = secret.store.get("acme/secret").manifest.file("adapter_model.safetensors").sha256
    secret.ask("/api/repos/create", "POST", {"name": "mine", "organization": "bob"}, token="bob")
    lines = [
        {"key": "header", "value": {"summary": "take"}},
        {"key": "lfsFile", "value": {"path": "adapter_model.safetensors", "algo": "sha256", "oid": sha256}},
    ]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    answer = secret.ask("/api/models/bob/mine/commit/main", "POST", body, token="bob")
    assert answer.status == 400 and b"was not uploaded to bob/mine" in answer.body
    batch = {"operation": "upload", "objects": [{"oid": sha256, "size": 10}]}
    answer = secret.ask("/bob/mine.git/info/lfs/objects/batch", "POST", batch, token="bob")
    assert "upload" in answer.json()["objects"][0]["actions"]  # nor does it tell that the bytes are here


def test_upload_links_are_signed(secret) -> None:
    batch = {"operation": "upload", "objects": [{"oid": "a" * 64, "size": 3}]}
    answer = secret.ask("/acme/open.git/info/lfs/objects/batch", "POST", batch, token="alice")
    href = answer.json()["objects"][0]["actions"]["upload"]["href"].removeprefix(secret.url)
    for wrong in (
        href.replace("/acme/open/", "/acme/secret/"),
        href.replace("a" * 64, "b" * 64),
        href.replace("size=3", "size=4"),
        href[:-1] + ("0" if href[-1] != "0" else "1"),
        href.replace("expires=", "expires=9"),
    ):
        assert secret.ask(wrong, "PUT", b"abc").status == 403
    assert secret.ask(href, "PUT", b"abc").status == 400  # signed, but not the bytes that were announced
    assert secret.ask("/acme/open.git/info/lfs/objects/batch", "POST", batch, token="bob").status == 403


def test_a_revoked_token_is_dead_at_once(guarded) -> None:
    assert guarded.ask("/api/whoami-v2", token="alice").status == 200
    tokens.revoke(guarded.context.authority.path, "alice")
    assert guarded.ask("/api/whoami-v2", token="alice").status == 401
    guarded.context.authority.path.write_text("{")
    assert guarded.ask("/api/whoami-v2", token="root").status == 503  # a broken file locks the door


def test_basic_credentials_read_but_do_not_write(secret) -> None:
    import base64

    value = base64.b64encode(f"me:{secret.tokens['alice']}".encode()).decode()
    headers = {"Authorization": f"Basic {value}"}
    assert secret.ask("/acme/secret", headers=headers).status == 200
    assert secret.ask("/api/repos/create", "POST", {"name": "x"}, headers=headers).status == 401
    login = secret.ask("/-/login")
    assert login.status == 401 and login.headers["www-authenticate"].startswith("Basic ")
    assert secret.ask("/-/login", headers=headers).status == 303


def test_a_registry_may_be_closed_to_strangers(guarded, send_directory, tag, files) -> None:
    send_directory(guarded, "acme/tone", files(), token="alice")
    tag(guarded, "acme/tone", "1.0.0", token="alice")
    path = guarded.context.authority.path
    path.write_text(json.dumps({**json.loads(path.read_text()), "anonymous": False}))
    for place in ("/api/models/acme/tone", "/acme/tone/resolve/main/README.md", "/acme/tone", "/"):
        assert guarded.ask(place).status == 401
        assert guarded.ask(place, token="reader").status == 200
    assert guarded.ask("/api/models").json() == []
    assert [model["id"] for model in guarded.ask("/api/models", token="bob").json()] == ["acme/tone"]  # no stranger


def test_the_tokens_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    runner = CliRunner()
    done = runner.invoke(registry, ["token", "add", "ci", "--write", "acme", "--read", "*", "--tokens", str(path)])
    assert done.exit_code == 0, done.output
    text = done.stdout.strip()
    assert text.startswith("mlm_") and len(text) > 40
    assert text not in path.read_text()  # only its hash
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caller = tokens.Tokens(path).identify(f"Bearer {text}")
    assert (caller.name, caller.may_write("acme"), caller.may_write("bob"), caller.may_read("bob")) == (
        "ci", True, False, True,
    )  # fmt: skip
    listed = runner.invoke(registry, ["token", "list", "--tokens", str(path)])
    assert listed.stdout.startswith("ci\twrite acme, read *")
    with pytest.raises(UsageError, match="already"):
        tokens.add(path, "ci", read_scopes=("*",), write_scopes=())
    with pytest.raises(UsageError, match="may do nothing"):
        tokens.add(path, "idle", read_scopes=(), write_scopes=())
    with pytest.raises(UsageError, match="namespace"):
        tokens.add(path, "x", read_scopes=(), write_scopes=("../etc",))
    with pytest.raises(NotFound) as caught:
        tokens.revoke(path, "cli")
    assert caught.value.hint == "did you mean ci?"
    tokens.revoke(path, "ci")
    with pytest.raises(ApiError):
        tokens.Tokens(path).identify(f"Bearer {text}")


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Basic !!", "Basic /w==", "Digest x", "mlm_x", "Bearer \xff"])
def test_malformed_credentials(tmp_path: Path, header: str) -> None:
    path = tmp_path / "tokens.json"
    tokens.add(path, "ci", read_scopes=("*",), write_scopes=())
    with pytest.raises(ApiError) as caught:
        tokens.Tokens(path).identify(header)
    assert caught.value.status == 401


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"tokens": [{"name": "x"}]}',
        '{"tokens": [{"name": "x", "sha256": "00"}]}',
        '{"token": []}',
        '{"tokens": [{"name": "x\\n", "sha256": "%s"}]}' % ("0" * 64),
    ],
)
def test_a_malformed_tokens_file_starts_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(StoreError):
        tokens.Tokens(path)


def test_a_registry_of_the_schema_before_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    root.mkdir()
    with sqlite3.connect(root / "registry.sqlite") as db:
        db.execute(
            "CREATE TABLE repos (name TEXT PRIMARY KEY, visibility TEXT NOT NULL, gated INTEGER NOT NULL, "
            "created REAL NOT NULL, deleted INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID"
        )
        rows = [("acme/a", "private", 1, 5.0, 0), ("acme/b", "public", 0, 6.0, 1)]
        db.executemany("INSERT INTO repos VALUES (?, ?, ?, ?, ?)", rows)
        db.execute("PRAGMA user_version = 1")
    for _ in range(2):  # moved once, and then read
        drafts = Drafts(root)
        with drafts.read() as db:
            assert find_repo(db, "acme/a") == Repo("acme/a", "private", "manual", 5.0)
            assert find_repo(db, "acme/b") == Repo("acme/b", "public", "", 6.0, deleted=True)
            assert version_tags(db, "acme/a") == {}


def test_private_is_private_however_its_name_is_written(secret) -> None:
    """Who may see what does not hang on capitals, neither of the address nor of the token's namespaces."""
    names = ("acme/secret", "Acme/secret", "ACME/SECRET")
    assert {secret.ask(f"/api/models/{name}").status for name in names} == {401}
    assert {secret.ask(f"/api/models/{name}", token="alice").status for name in names} == {200}
    assert {secret.ask(f"/api/models/{name}", token="bob").status for name in names} == {404}
    seen = [model["id"] for model in secret.ask("/api/models").json()]
    assert "acme/secret" not in [name.lower() for name in seen]
