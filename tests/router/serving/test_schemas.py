"""Random JSON schemas: every answer that ends is valid, of any kind of row, whole and in pieces."""

from __future__ import annotations

import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from router.engine.engine import Engine
from router.serving.app import create_app

spec = importlib.util.spec_from_file_location("schemas", Path(__file__).with_name("schemas.py"))
schemas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schemas)

BASE = "builtin:tiny-lm"
MODELS = ("law", "0.5 * law + code", "ensemble.mean(law, code)", "arrow", "near", BASE)
REAL = "MODULOOM_INSTRUCT_MODEL"  # a directory of an instruct model


@pytest.fixture(scope="module")
def client(published, routers):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=16)
    with TestClient(create_app(engine)) as client:
        yield client


def answers(client, path, count, models, **fields):
    """(schema, finish reason, text) of so many schemas, asked for side by side."""

    def answer(seed):
        wanted = schemas.schema(seed)
        Draft202012Validator.check_schema(wanted)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": wanted}}
        told = {"model": models[seed % len(models)], "temperature": 1, "seed": seed, "response_format": form, **fields}
        if seed % 4 == 3:
            events = client.post(path, json={**told, "stream": True}).text.split("\n\n")
            choices = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events if e.startswith("data: {")]
            texts = [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
            return wanted, choices[-1]["finish_reason"], "".join(texts)
        said = client.post(path, json=told)
        assert said.status_code == 200, (wanted, said.text)
        choice = said.json()["choices"][0]
        return wanted, choice["finish_reason"], choice["text"] if "text" in choice else choice["message"]["content"]

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(answer, range(count))


def all_valid(told) -> int:
    """How many have ended; each of them is valid."""
    ended = 0
    for wanted, finish, text in told:
        if finish == "stop":
            Draft202012Validator(wanted).validate(json.loads(text))
            ended += 1
        else:
            assert finish == "length", (wanted, finish, text)
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)
    return ended


def test_answers_to_a_handful_of_schemas(client):
    assert all_valid(answers(client, "/v1/completions", 24, MODELS, prompt="To be", max_tokens=480)) == 24


@pytest.mark.slow
def test_answers_to_two_hundred_schemas(client):
    assert all_valid(answers(client, "/v1/completions", 200, MODELS, prompt="To be", max_tokens=500)) == 200


@pytest.mark.slow
@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no instruct model")
def test_answers_of_an_instruct_model_to_two_hundred_schemas(published):
    turns = [{"role": "user", "content": "Make up a record of somebody as JSON."}]
    with TestClient(create_app(Engine(os.environ[REAL], store=published.store, dtype="fp32"))) as client:
        told = answers(client, "/v1/chat/completions", 200, ("",), messages=turns, max_tokens=800)
        assert all_valid(told) >= 190  # a number, or a pattern without a bound, may go on until there is no more room
