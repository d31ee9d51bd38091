"""The API in a client's eyes: scores in streams, fields that are refused by name, models, and queues that are full."""

from __future__ import annotations

import json
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from starlette.testclient import TestClient

import router
from router.engine.engine import Engine
from router.engine.job import ServerBusy
from router.engine.request import Request
from router.serving.app import create_app

BASE = "builtin:tiny-lm"
CHAT = [{"role": "user", "content": "To be"}]


@pytest.fixture(scope="module")
def client(published, routers):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=8)
    engine.host.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with TestClient(create_app(engine)) as client:
        yield client


def ask(client, path="/v1/completions", **fields):
    text = {"messages": CHAT} if "chat" in path else {"prompt": "The parties agree"}
    return client.post(path, json={"model": "law", "temperature": 0, "max_tokens": 8, **text, **fields})


def stream(client, path="/v1/completions", **fields) -> list:
    *pieces, done = ask(client, path, stream=True, **fields).text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


@pytest.mark.parametrize("stop", [None, "the"])
def test_streams_carry_the_scores_of_their_tokens(client, stop):
    options = {"logprobs": 2, "n": 2, "temperature": 1, "seed": 3, "stop": stop}
    whole = ask(client, **options).json()
    pieces = stream(client, **options, stream_options={"include_usage": True})
    assert pieces[-1]["usage"] == whole["usage"]
    assert all(piece["usage"] is None for piece in pieces[:-1])
    for choice in whole["choices"]:
        own = [c for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        told = [c["logprobs"] for c in own if c["logprobs"] is not None]
        joined = {name: [value for part in told for value in part[name]] for name in told[0]}
        for name, values in choice["logprobs"].items():
            found = joined[name]
            if name == "top_logprobs":
                assert [list(x) for x in found] == [list(x) for x in values]
            elif name == "token_logprobs":
                assert found == pytest.approx(values, abs=1e-4)
            else:
                assert found == values
        assert len(joined["tokens"]) >= 3


def test_chat_streams_carry_them_too_and_say_nothing_where_none_were_asked_for(client):
    path = "/v1/chat/completions"
    wanted = ask(client, path, logprobs=True, top_logprobs=2).json()["choices"][0]
    choices = [p["choices"][0] for p in stream(client, path, logprobs=True, top_logprobs=2)]
    told = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert [t["token"] for t in told] == [t["token"] for t in wanted["logprobs"]["content"]]
    assert all(len(t["top_logprobs"]) == 2 for t in told)
    assert "".join(c["delta"].get("content", "") for c in choices) == wanted["message"]["content"]
    assert all(p["choices"][0]["logprobs"] is None for p in stream(client, path))


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "suffix", "end"),
        ("/v1/completions", "best_of", 3),
        ("/v1/completions", "min_tokens", 3),
        ("/v1/completions", "stop_token_ids", [5]),
        ("/v1/chat/completions", "echo", True),
        ("/v1/completions", "guided_decoding_backend", "mine"),
        ("/v1/chat/completions", "functions", [{"name": "f"}]),
        ("/v1/chat/completions", "messages", [{**CHAT[0], "function_call": {"name": "f"}}]),
        ("/v1/responses", "previous_response_id", "resp_1"),
        ("/v1/responses", "store", True),
        ("/v1/embeddings", "truncate_prompt_tokens", 5),
        ("/v1/classify", "raw_scores", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, path, field, value):
    body = {"model": "mood", "input": "To be", field: value}
    other = path.rpartition("/")[2] in ("classify", "responses", "embeddings")
    answer = client.post(path, json=body) if other else ask(client, path, **{field: value})
    assert answer.status_code == 400
    told = answer.json()["error"]["message"]
    assert f"{'function_call' if field == 'messages' else field} is not supported" in told


def test_a_misspelt_field_names_the_nearest(client):
    assert "did you mean temperature?" in ask(client, temperatur=0).json()["error"]["message"]


def test_fields_that_ask_for_what_is_done_anyway_are_taken(client):
    plain = ask(client).json()["choices"]
    idle = {"user": "me", "best_of": 1, "echo": False, "top_k": -1, "frequency_penalty": 0, "logit_bias": {}}
    assert ask(client, **idle, suffix=None).json()["choices"] == plain
    idle = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    assert ask(client, "/v1/chat/completions", **idle).status_code == 200
    assert "logprobs: true" in ask(client, "/v1/chat/completions", top_logprobs=2).json()["error"]["message"]


def test_a_model_is_looked_up_by_its_name(client):
    assert client.get(f"/v1/models/{BASE}").json()["parent"] is None
    for name in ("local/law", "local/law@1.0.0", "law", "0.5 * law + code", "near"):
        assert client.get(f"/v1/models/{name}").json()["parent"] == BASE, name
    missing = client.get("/v1/models/local/lwa")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert "local/law" in missing.json()["error"]["message"]


def test_routers_and_ensembles_are_models_like_others(client):
    for model in ("near", "arrow", "ensemble.demix(law, code)"):
        assert ask(client, model=model).json()["choices"][0]["finish_reason"] == "length", model
        assert "".join(p["choices"][0].get("text", "") for p in stream(client, model=model))
    told = client.post("/v1/classify", json={"model": "tasks", "input": ["To be", "import os"]}).json()["data"]
    assert all(sum(one["scores"].values()) == pytest.approx(1, abs=1e-4) for one in told)


def test_a_request_names_its_task(client, published):
    router.fit(["law", "code"], "task", "local/tenants@1.0.0", store=published.store)
    router.fit(["mood", "topic"], "task", "local/desks@1.0.0", store=published.store)
    for task in ("law", "code"):
        said, alone = ask(client, model="tenants", task=task), ask(client, model=task)
        assert said.json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]
    body = {"model": "desks", "input": "To be", "task": "topic"}
    assert set(client.post("/v1/classify", json=body).json()["data"][0]["scores"]) == {"art", "sport", "war"}
    refused = ask(client, model="tenants", task="lwa")
    assert refused.status_code == 404 and "did you mean law" in refused.json()["error"]["message"]
    for fields in ({"model": "tenants"}, {"model": "law", "task": "law"}):
        assert ask(client, **fields).status_code == 400


def test_a_place_that_was_given_up_is_free_at_once(published):
    """Rows that wait: a full queue refuses, and one that leaves makes room."""
    engine = Engine(BASE, store=published.store, dtype="fp32")
    scheduler = engine.scheduler
    scheduler.waiting = 2
    scheduler.hold()  # everything waits
    row = engine.prepare(Request(text="To be", adapter="law", max_new_tokens=2))
    told, ended = [], threading.Event()
    first, _second = (scheduler.submit(row, told.append) for _ in range(2))
    with pytest.raises(ServerBusy, match="2 requests are waiting"):
        scheduler.submit(row, told.append)
    scheduler.cancel(first)
    scheduler.submit(row, lambda answer: (told.append(answer), ended.set()))
    scheduler.start()
    assert ended.wait(30)
    assert [answer.written for answer in told] == [2, 2]
    engine.close()
