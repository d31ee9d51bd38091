"""Versions, tags and yanks during traffic: the next request has them, and what is under way ends as it began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

SHORT, LONG = 6, 120
VERSIONS = ("1.0.0", "1.1.0", "1.2.0", "1.3.0")
MIXED = "0.5 * law + 0.5 * other"
CLIENTS = 3


@pytest.fixture(scope="module")
def store(published, tmp_path_factory):
    root = tmp_path_factory.mktemp("versions")
    made = type(published)(root)
    made.publish("other", seed=90)
    for seed, version in enumerate(VERSIONS):  # those to come are made now: a push is then what it is for a user, quick
        made.publish("law", seed=seed + 1, version=version)
    later = type(published)(tmp_path_factory.mktemp("served"))
    for ready in ("other-1.0.0", "law-1.0.0"):
        later.store.put(root / "dirs" / ready)
    return made.store, later.store, root / "dirs"


@pytest.fixture(scope="module")
def port(store):
    environment = {**os.environ, "HUB_HOME": str(store[1].root)}
    command = [sys.executable, "-m", "hub", "serve", "builtin:tiny-lm", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    yield int(process.stdout.readline().rsplit(":", 1)[1])
    process.kill()
    process.communicate()


def send(port, model, tokens, **fields):
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"model": model, "prompt": "The parties agree", "max_tokens": tokens, "temperature": 0, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection.getresponse()


def ask(port, model, tokens=SHORT):
    response = send(port, model, tokens)
    told = json.loads(response.read())
    assert response.status == 200, told
    return told["choices"][0]["text"]


class Streaming:
    """A long answer under way: its first piece has come."""

    def __init__(self, port, model):
        self.response = send(port, model, LONG, stream=True)
        self.text = ""
        self.read(1)

    def read(self, most=None):
        """So many pieces, or all."""
        while most is None or most > 0:
            line = self.response.readline().decode().strip()
            if line == "data: [DONE]":
                break
            if line.startswith("data: "):
                self.text += json.loads(line[6:])["choices"][0]["text"]
                most = None if most is None else most - 1
        return self.text


def test_what_is_pushed_tagged_and_yanked_during_traffic(store, port):
    made, served, dirs = store
    alone = {v: ask_of(made, v) for v in VERSIONS}
    assert len({tuple(texts.values()) for texts in alone.values()}) == len(VERSIONS)
    states = [("1.0.0", None)]  # what law and law@stable stand for after each change
    began = threading.Event()
    over, wrong, counts = threading.Event(), [], [0] * CLIENTS

    def expected(model, state):
        version = state[1] if model == "law@stable" else state[0]
        return None if version is None else alone[version][MIXED if model == MIXED else "law"]

    def client(number):
        models = ("law", MIXED, "law@stable")
        while not over.is_set():
            model = models[(number + counts[number]) % (3 if states[-1][1] and len(states) > 2 else 2)]
            first = max(0, len(states) - 2)  # a change is entered before it begins, so the one before may still hold
            text = ask(port, model)
            may = {expected(model, state) for state in states[first:]}
            if text not in may:
                wrong.append((model, text, may))
            counts[number] += 1
            if all(counts):
                began.set()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        assert began.wait(60)
        streams = [(Streaming(port, "law"), "1.0.0")]

        def change(do, state):
            states.append(state)
            do()
            for model in ("law", MIXED, *(("law@stable",) if state[1] else ())):
                assert ask(port, model) == expected(model, state), f"{model} is not what it is since {state}"
            time.sleep(0.2)

        change(lambda: served.tag("local/law@1.0.0", "stable"), ("1.0.0", "1.0.0"))
        for version in VERSIONS[1:]:
            change(lambda v=version: served.put(dirs / f"law-{v}"), (version, states[-1][1]))
            streams.append((Streaming(port, "law"), version))
        change(lambda: served.tag("local/law@1.2.0", "stable"), ("1.3.0", "1.2.0"))
        change(lambda: served.yank("local/law@1.3.0", "broken"), ("1.2.0", "1.2.0"))
        change(lambda: served.yank("local/law@1.3.0", None), ("1.3.0", "1.2.0"))
        told = [(stream.read(), version) for stream, version in streams]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert sum(counts) > 20
    assert [text for text, _ in told] == [alone[version]["long"] for _, version in told]


def ask_of(made, version):
    """What a version answers alone, in an engine that has nothing else to do."""
    from router.engine.engine import Engine
    from router.engine.request import Request

    engine = Engine("builtin:tiny-lm", store=made, dtype="fp32")
    law = f"law@{version}"
    wanted = {"law": (law, SHORT), MIXED: (MIXED.replace("law", law), SHORT), "long": (law, LONG)}
    rows = [Request(text="The parties agree", adapter=a, max_new_tokens=n) for a, n in wanted.values()]
    answers = [engine.run([row])[0].text for row in rows]
    engine.close()
    return dict(zip(wanted, answers, strict=True))
