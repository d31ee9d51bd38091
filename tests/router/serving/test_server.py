"""The HTTP API over a real server on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

import uvicorn

from hub.cli import main
from router.engine.engine import Engine
from router.engine.request import Request
from router.serving.app import create_app

BASE = "builtin:tiny-lm"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Client:
    """Speaks HTTP with one connection a request; an answer has status_code, text and json()."""

    def __init__(self, address):
        self.address, self.headers = address, {}

    def get(self, path, headers=None):
        return self._answer("GET", path, None, headers)

    def post(self, path, json=None, content=None):
        return self._answer("POST", path, dump(json) if content is None else content, None)

    def open(self, path, body):
        connection = HTTPConnection(*self.address, timeout=60)
        connection.request("POST", path, dump(body), {"Content-Type": "application/json", **self.headers})
        return connection, connection.getresponse()

    def _answer(self, method, path, body, headers):
        connection = HTTPConnection(*self.address, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json", **self.headers, **(headers or {})})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        told = dict(response.getheaders())
        return SimpleNamespace(status_code=response.status, text=text, headers=told, json=lambda: json.loads(text))


def dump(value):
    return json.dumps(value).encode()


class Running:
    def __init__(self, engine, **options):
        config = uvicorn.Config(create_app(engine, **options), log_level="warning", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def serving(published):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=8)
    engine.host.tokenizer.chat_template = TEMPLATE
    running = Running(engine, directories=True)
    yield running
    running.stop()


@pytest.fixture
def client(serving):
    return Client(serving.address)


def events(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def wait_until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def ask(client, **fields):
    return client.post(
        "/v1/completions", json={"prompt": "The parties agree", "temperature": 0, "max_tokens": 6, **fields}
    )


def test_a_completion_is_what_the_engine_says(client, engine):
    for model in (BASE, "local/law", "law", f"{BASE}:law", "0.5 * law + code", ""):
        answer = ask(client, model=model).json()
        wanted = engine.run([Request(text="The parties agree", adapter=model, max_new_tokens=6)])[0]
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (wanted.text, wanted.finish)
        assert answer["object"] == "text_completion"
        assert answer["model"] == model
        assert answer["usage"] == {
            "prompt_tokens": wanted.read,
            "completion_tokens": wanted.written,
            "total_tokens": wanted.read + wanted.written,
        }


def test_streams_say_the_same_in_pieces(client):
    whole = ask(client, model="law", prompt=["The parties", "To be"]).json()
    pieces = events(
        ask(client, model="law", prompt=["The parties", "To be"], stream=True, stream_options={"include_usage": True})
    )
    for index in (0, 1):
        own = [c for p in pieces for c in p["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == whole["choices"][index]["text"]
        assert [c["finish_reason"] for c in own][-1] == whole["choices"][index]["finish_reason"]
        assert len(own) > 3
    assert pieces[-1]["usage"] == whole["usage"]
    assert len({p["id"] for p in pieces}) == 1


def test_chat_goes_through_the_template(client, engine):
    messages = [{"role": "user", "content": "The parties agree"}]
    body = {
        "model": "law",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client.post("/v1/chat/completions", json=body).json()
    text = "user: The parties agree\nassistant:"
    wanted = engine.run([Request(text=text, adapter="law", max_new_tokens=5, special=False, scores=2)])[0]
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert len(choice["logprobs"]["content"]) == 5
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    pieces = events(
        client.post("/v1/chat/completions", json={**body, "logprobs": False, "top_logprobs": 0, "stream": True})
    )
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == wanted.text


def test_waiting_requests_of_any_adapters_share_a_batch_and_do_not_disturb_each_other(client, serving, engine):
    models = ["law", "code", "tone", "lead", "0.5 * law + code", "law >> tone", ""] * 3
    wanted = engine.run(
        [Request(text="To be" + " or" * (i % 4), adapter=m, max_new_tokens=4 + i % 9) for i, m in enumerate(models)]
    )

    def one(i):
        return ask(client, model=models[i], prompt="To be" + " or" * (i % 4), max_tokens=4 + i % 9).json()

    with ThreadPoolExecutor(16) as pool:
        told = [answer["choices"][0]["text"] for answer in pool.map(one, range(len(models)))]
    assert told == [w.text for w in wanted]
    metrics = client.get("/metrics").text
    assert "moduloom_running_rows 0" in metrics
    assert float(metrics.split('batch_rows_bucket{le="2.0"} ')[1].split()[0]) < len(models)


def test_classification_beside_generation(client, engine):
    answer = client.post("/v1/classify", json={"model": "mood", "input": ["To be", "The war"]}).json()
    wanted = engine.run([Request(text=t, adapter="mood", scores=2) for t in ("To be", "The war")])
    assert [d["label"] for d in answer["data"]] == [w.label for w in wanted]
    assert answer["data"][0]["scores"] == pytest.approx(dict(wanted[0].scores), abs=1e-4)
    refused = ask(client, model="mood")
    assert refused.status_code == 400
    assert "/v1/classify" in refused.json()["error"]["message"]


def test_models_say_parent_and_root(client):
    found = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
    assert found[BASE]["parent"] is None
    assert found["local/law"]["parent"] == BASE
    assert found["local/law"]["root"] == "local/law@1.0.0"
    assert {m["object"] for m in found.values()} == {"model"}


def test_adapters_are_loaded_replaced_and_unloaded_while_it_runs(client, published, tmp_path):
    places = [published.store.get(f"local/{name}").materialize(tmp_path / name) for name in ("law", "code")]
    law, code = (ask(client, model=name).json()["choices"][0]["text"] for name in ("law", "code"))
    load = {"lora_name": "mine", "lora_path": str(places[0])}
    assert client.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert ask(client, model="mine").json()["choices"][0]["text"] == law
    assert client.post("/v1/load_lora_adapter", json=load).status_code == 409
    again = {"lora_name": "mine", "lora_path": str(places[1]), "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=again).status_code == 200
    assert ask(client, model="mine").json()["choices"][0]["text"] == code
    assert client.post("/v1/load_lora_adapter", json={**again, "lora_path": "local/nothing"}).status_code == 404
    assert ask(client, model="mine").json()["choices"][0]["text"] == code  # as it was
    assert "mine" in {m["id"] for m in client.get("/v1/models").json()["data"]}
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert ask(client, model="mine").status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "lwa"}, 404, "law"),
        ({"model": "law", "prompt": 5}, 400, "prompt"),
        ({"model": "law", "prompt": ""}, 400, "empty"),
        ({"model": "law", "max_tokens": 5000}, 400, "more than the 512"),
        ({"model": "law", "temperature": -1}, 400, "temperature"),
        ({"model": "law", "length_penalty": 2}, 400, "not supported"),
        ({"model": "law +"}, 400, "missing"),
        ({"model": "law", "prompt": ["a"] * 300}, 400, "300 rows"),
    ],
)
def test_errors_have_the_shape_clients_know(client, body, status, words):
    answer = ask(client, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_broken_bodies_and_paths(client):
    assert "not JSON" in client.post("/v1/completions", content=b"{oops").json()["error"]["message"]
    assert client.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/nowhere").status_code == 404
    big = client.post("/v1/completions", content=b" " * (9 * 2**20))
    assert "larger than 8 MiB" in big.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_row(serving, client):
    body = {"model": "law", "prompt": "To be", "max_tokens": 500, "stream": True, "temperature": 1.5, "seed": 1}
    connection, response = client.open("/v1/completions", body)
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    wait_until(lambda: "moduloom_running_rows 0" in client.get("/metrics").text)
    assert ask(client, model="law").status_code == 200


def test_one_that_waits_for_a_whole_answer_and_leaves_frees_its_row_too(client):
    body = {"model": "law", "prompt": "To be", "max_tokens": 500, "temperature": 1.5, "seed": 1}
    connection = HTTPConnection(*client.address, timeout=60)
    connection.request("POST", "/v1/completions", dump(body), {"Content-Type": "application/json"})
    wait_until(lambda: "moduloom_running_rows 1" in client.get("/metrics").text)
    connection.close()
    wait_until(lambda: "moduloom_running_rows 0" in client.get("/metrics").text, seconds=2)  # 500 tokens take longer


def test_a_token_is_asked_for_and_an_open_address_needs_one(published):
    engine = Engine(BASE, store=published.store, dtype="fp32")
    running = Running(engine, token="s3cret", waiting=1)
    try:
        client = Client(running.address)
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            refused = client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        client.headers["Authorization"] = "Bearer s3cret"
        assert client.get("/v1/models").status_code == 200
        busy = ask(client, model="law", prompt=["a b c"] * 40)
        assert busy.status_code == 429
        assert busy.json()["error"]["code"] == "rate_limit_exceeded"
        assert busy.headers["retry-after"] == "1"
    finally:
        running.stop()
    found = CliRunner().invoke(main, ["serve", BASE, "--host", "0.0.0.0"])
    assert found.exit_code == 2
    assert "without a token" in found.output


def test_adapters_come_and_go_under_a_tight_budget(published, engine):
    names = ["law", "code", "tone", "lead", "0.5 * law + code", "ensemble.mean(law, code)", "ties(law, law)"]
    tight = Engine(BASE, store=published.store, dtype="fp32", rows=3)
    tight.residency.budget = max(tight.sources.known(name).bytes for name in ("law", "code", "tone", "lead"))
    asked = [(names[i % len(names)], 2 + i % 5) for i in range(35)]
    wanted = engine.run([Request(text="To be", adapter=n, max_new_tokens=m) for n, m in asked])
    running = Running(tight)
    try:
        client = Client(running.address)
        with ThreadPoolExecutor(12) as pool:
            told = list(pool.map(lambda a: ask(client, model=a[0], prompt="To be", max_tokens=a[1]).json(), asked))
    finally:
        running.stop()
    assert [t["choices"][0]["text"] for t in told] == [w.text for w in wanted]
    assert tight.residency.counts.evicted > 3
