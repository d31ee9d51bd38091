"""Bad input is never 500, and every answer has OpenAI's shape."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from starlette.testclient import TestClient

from router.engine.engine import Engine
from router.serving.app import create_app

BASE = "builtin:tiny-lm"
TEXT, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"
TURN = {"role": "user", "content": "To be"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% if m.role == 'odd' %}{{ 1 + m.content }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def client(published):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=4, tokens=256)
    engine.host.tokenizer.chat_template = TEMPLATE
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def ask(client, path, **fields):
    given = {TEXT: {"prompt": "To be"}, CHAT: {"messages": [TURN]}, CLASSIFY: {"input": "To be"}}[path]
    model = "mood" if path == CLASSIFY else "law"
    sampled = {} if path == CLASSIFY else {"max_tokens": 3, "temperature": 0}
    return client.post(path, content=json.dumps({"model": model, **sampled, **given, **fields}))


def refused(answer, status, param=None, code=None):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    return error["message"]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"role": "system", "content": "x"}], "no system turns"),
        ([{"role": "odd", "content": "x"}], "chat template"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "no text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "bold": True}]}], "bold"),
    ],
)
def test_conversations_that_cannot_be_read_are_refused_by_name(client, turns, words):
    assert words in refused(ask(client, CHAT, messages=turns), 400, "messages")


def test_contents_in_parts_and_null_contents_of_the_assistant_are_read(client):
    plain = ask(client, CHAT, messages=[{"role": "user", "content": "To be or"}]).json()["choices"]
    parts = [{"type": "text", "text": "To be"}, {"type": "text", "text": " or"}]
    turns = [{"role": "assistant", "content": None}, {"role": "user", "content": parts, "name": None}]
    assert ask(client, CHAT, messages=turns).json()["choices"] == plain


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, b'{"model": "law", "prompt": "a \\ud800 b"}', "prompt"),
        (TEXT, b'{"model": "law", "prompt": ["a", "\\udfff"]}', "prompt"),
        (TEXT, b'{"model": "law", "prompt": "a", "stop": "\\ud800"}', "stop"),
        (TEXT, b'{"model": "\\ud800", "prompt": "a"}', "model"),
        (TEXT, b'{"model": "law", "prompt": "a", "\\ud800": 1}', "\\ud800"),
        (CHAT, b'{"model": "law", "messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
        (CLASSIFY, b'{"model": "mood", "input": "\\ud800"}', "input"),
    ],
)
def test_half_characters_are_refused_by_the_name_of_their_field(client, path, body, param):
    assert "half a character" in refused(client.post(path, content=body), 400, param)


@pytest.mark.parametrize("path", [TEXT, CHAT, CLASSIFY])
def test_a_null_is_a_field_that_was_left_out(client, path):
    names = ["temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs", "task", "user"]
    names += ["echo", "best_of", "frequency_penalty", "logit_bias", "top_k", "tools", "response_format"]
    for name in names:
        assert ask(client, path, **{name: None}).status_code == 200, name
    for name in ("prompt", "messages", "input"):
        if name in {TEXT: "prompt", CHAT: "messages", CLASSIFY: "input"}[path]:
            assert "equired" in refused(ask(client, path, **{name: None}), 400, name)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"\x00" * 9),
        *(b'{"model": 5, "prompt": "a"}', b'{"prompt": {"a": 1}}', b'{"prompt": []}', b'{"prompt": [[]]}'),
        *(b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "seed": 1.5}', b'{"prompt": "a", "stop": ""}'),
        *(b'{"prompt": "a", "stop": [""]}', b'{"prompt": "a", "n": -1}', b'{"prompt": "a", "stream_options": 4}'),
        *(b'{"prompt": "a", "max_tokens": 99999999999999999999}', b'{"prompt": "a", "logprobs": 99}'),
        *(b'{"prompt": "a", "model": "((((law"}', b'{"prompt": "a", "model": "../../etc"}'),
        *(b'{"prompt": "a", "model": "a@sha256:00"}', b'{"prompt": "a", "model": "\\u0000"}'),
        b'{"prompt": "a", "model": "' + b"(" * 5000 + b'law"}',
        b'{"prompt": "a", "model": "' + b"law+" * 3000 + b'law"}',
    ],
)
@pytest.mark.parametrize("path", [TEXT, CHAT, CLASSIFY])
def test_no_body_is_a_fault_of_the_server(client, path, body):
    answer = client.post(path, content=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_too_long_for_the_base_and_too_large_for_the_engine_are_told_apart(client):
    long = "word " * 600
    assert "512" in refused(ask(client, TEXT, prompt=long), 400, "prompt", "context_length_exceeded")
    turns = [{"role": "user", "content": long}]
    refused(ask(client, CHAT, messages=turns), 400, "messages", "context_length_exceeded")
    never = ask(client, TEXT, max_tokens=300)
    assert "256" in refused(never, 429, None, "request_too_large")
    assert "retry-after" not in never.headers  # it would be refused again
    streamed = ask(client, TEXT, max_tokens=300, stream=True)
    refused(streamed, 429, None, "request_too_large")


def test_no_answer_names_the_stores_folder(client, published):
    root = str(published.store.root)
    for name in ("nope/none", "local/lwa", "local/law@9.9.9", "local/law@nightly", "law@sha256:" + "0" * 64):
        answer = ask(client, TEXT, model=name)
        assert root not in refused(answer, 404, "model", "model_not_found")
        assert root not in client.get(f"/v1/models/{name}").text
        assert root not in client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": name}).text


def test_paths_and_methods_that_are_not_there(client):
    refused(client.get("/nowhere"), 404, None, "not_found")
    wrong = client.get(TEXT)
    refused(wrong, 405, None, "refused")
    assert wrong.headers["allow"] == "POST"


def test_what_breaks_inside_is_500_in_the_same_shape(client, monkeypatch):
    engine = client.app.state.engine

    def broken(_request):
        raise ZeroDivisionError("at /a/place")

    monkeypatch.setattr(engine, "prepare", broken)
    assert refused(ask(client, TEXT), 500, None, "internal_error") == "ZeroDivisionError"


def test_tokens_are_counted_by_the_digest_that_answered_and_time_in_the_queue(client, published):
    def counted(digest, kind) -> float:
        start = f'moduloom_adapter_tokens_total{{digest="{digest}",kind="{kind}"}} '
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))

    def waited() -> float:
        return float(client.get("/metrics").text.split("moduloom_queue_seconds_count ")[1].split()[0])

    for name, digest in (("law", published.store.get("law").digest), (BASE, "base")):
        before = counted(digest, "prompt"), counted(digest, "generated"), waited()
        usage = ask(client, TEXT, model=name, n=2, temperature=1, max_tokens=4).json()["usage"]
        end = time.monotonic() + 5
        while counted(digest, "generated") == before[1] or waited() < before[2] + 2:  # told just after the answer
            assert time.monotonic() < end
        assert counted(digest, "generated") == before[1] + usage["completion_tokens"]
        assert counted(digest, "prompt") == before[0] + 2 * usage["prompt_tokens"]


def test_an_answer_tells_the_digest_that_it_is_of(client, published):
    law = published.store.get("law").digest
    chat = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 2}
    asked = [
        ("/v1/completions", {"prompt": TEXT, "max_tokens": 2}),
        ("/v1/completions", {"prompt": TEXT, "max_tokens": 2, "stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/responses", {"input": TEXT, "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": TEXT}),
    ]
    for path, body in asked:
        answered = client.post(path, json={"model": "law", **body})
        assert answered.status_code == 200 and answered.headers["x-moduloom-digest"] == law, path
        if "completions" in path:
            assert f'"system_fingerprint": "{law}"' in answered.text.replace('":"', '": "'), path
        answered = client.post(path, json={"model": "0.5 * law + 0.5 * code", **body})
        assert answered.headers["x-moduloom-digest"] not in (law, ""), path
        bare = client.post(path, json={"model": BASE, **body})
        assert bare.status_code == 200 and "x-moduloom-digest" not in bare.headers, path


@pytest.fixture
def short():
    """A directory with a path that no message cuts."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def test_a_request_reaches_no_directory_of_the_server(published, short, monkeypatch):
    """Names given on the command line may stand for directories; paths in requests never do, there or not."""
    monkeypatch.chdir(short)
    published.store.get("law").materialize(short / "mine")
    (short / "mine" / "module.json").unlink()
    engine = Engine(BASE, store=published.store, adapters={"tone": short / "mine"}, dtype="fp32", rows=4, tokens=256)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        assert ask(client, TEXT, model="tone").status_code == 200
        assert ask(client, TEXT, model="0.5 * tone + code").status_code == 200
        said = set()
        for name in ("mine", "other"):
            for path in (f"./{name}", f"{short}/{name}", f"../{short.name}/{name}", f"~/{name}"):
                for text in (path, f'"{path}"', f'tone + "{path}"', f"{BASE}:{path}"):
                    answer = ask(client, TEXT, model=text)
                    assert answer.status_code in (400, 404), text
                    said.add((text.replace(name, "NAME"), answer.json()["error"]["message"].replace(name, "NAME")))
        assert len(said) == 4 * 4  # what is there and what is not is told alike
        assert ask(client, TEXT, model="mine").status_code == 404
