"""An engine under traffic: rows of all kinds join and leave, threads share it, and what a ref stands for moves."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import compose
from compose.errors import KindError
from hub.errors import HubError
from router.engine.engine import Engine
from router.engine.job import ServerStopped
from router.engine.request import Request, Result

spec = importlib.util.spec_from_file_location("traffic", Path(__file__).with_name("traffic.py"))
traffic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(traffic)
BASE = "builtin:tiny-lm"
LONG = 60  # seconds
WORDS = ["the", "law", "of", "all", "men", "is", "to", "be", "and", "not", "have"]


@pytest.fixture(scope="module")
def store(published, tmp_path_factory):
    made = type(published)(tmp_path_factory.mktemp("traffic"))
    made.publish("second", seed=30)
    traffic.publish_all(made)
    return made


@pytest.fixture(scope="module")
def engine(store):
    made = Engine(BASE, store=store.store, dtype="fp32", rows=12, tokens=1200)
    yield made
    made.close()


def draw(random: random.Random) -> Request:
    kinds = random.choices((traffic.SINGLE, traffic.ENSEMBLES, traffic.ROUTERS, traffic.HEADS), (6, 1, 1, 1))[0]
    samples = random.random() < 0.3
    return Request(
        text=" ".join(random.choices(WORDS, k=random.choice((1, 4, 9, 40)))),
        adapter=random.choice(kinds),
        max_new_tokens=random.choice((1, 2, 5, 12)),
        temperature=0.9 if samples else 0.0,
        top_p=0.95,
        seed=random.randrange(1000),
        scores=random.choice((0, 0, 2)),
    )


def same(one: Result, other: Result) -> bool:
    scores = [(t.log_prob, u.log_prob) for t, u in zip(one.tokens, other.tokens, strict=True)]
    close = all(abs(a - b) < 2e-3 for a, b in scores)
    return close and (one.text, one.finish, one.label) == (other.text, other.finish, other.label)


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_each_row_is_answered_as_if_it_were_alone(engine, count):
    """Rows of every kind join and leave at random, some are given up: each of the others is that of the row alone."""
    choose = random.Random(count)
    requests = [draw(choose) for _ in range(count)]
    engine.scheduler.waiting = count
    told: dict[int, Future] = {}
    for index, request in enumerate(requests):
        told[index] = future = Future()
        job = engine.submit(request, future.set_result)
        if choose.random() < 0.05:
            engine.cancel(job)
            del told[index]
        if choose.random() < 0.3:
            time.sleep(choose.random() * 0.05)
    together = {index: future.result(LONG * 10) for index, future in told.items()}
    wrong = [
        (requests[i], answer, alone)
        for i, answer in together.items()
        if isinstance(alone := engine.run([requests[i]], strict=False)[0], HubError)
        or isinstance(answer, HubError)
        or not same(answer, alone)
    ]
    assert wrong == []
    assert engine.scheduler.counts == (0, 0)
    assert engine.scheduler.work.bytes == 0


def test_threads_share_an_engine_and_the_base_has_one_owner(engine):
    requests = [draw(random.Random(seed)) for seed in range(24)]
    alone = [engine.run([request])[0] for request in requests]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda request: engine.run([request])[0], requests))
    assert all(same(a, b) for a, b in zip(answers, alone, strict=True))

    pieces, ended = threading.Event(), threading.Event()
    endless = Request(text="To be", adapter="prefix", max_new_tokens=400)
    job = engine.submit(endless, lambda _: ended.set(), lambda _: pieces.set())
    assert pieces.wait(LONG)
    ids = engine.host.tokenizer("To be", return_tensors="pt").input_ids
    with pytest.raises(KindError, match="an Engine computes on this model"):
        compose.activate(engine.host.model, None)
    with pytest.raises(KindError, match="an Engine computes on this model"):
        engine.host.model(input_ids=ids)
    assert not ended.is_set()
    engine.cancel(job)
    engine.run([requests[0]])  # once it has left
    compose.activate(engine.host.model, None)
    bare = engine.host.model(input_ids=ids).logits[0, -1].argmax()
    compose.activate(engine.host.model, None)
    again = engine.run([Request(text="To be", max_new_tokens=1)])[0]
    assert again.text == engine.host.tokenizer.decode([int(bare)])


def test_from_an_event_loop(engine):
    request = Request(text="The law of", adapter="lora", max_new_tokens=12)
    (wanted,) = engine.run([request])

    async def ask():
        answers = await asyncio.gather(*(engine.answer(request) for _ in range(3)))
        parts = [part async for part in engine.stream(request)]
        with pytest.raises(HubError, match="no adapter local/lroa"):
            await engine.answer(Request(text="x", adapter="lroa"))
        async for part in engine.stream(Request(text="The law", max_new_tokens=400)):
            assert part.text is not None
            break
        return answers, parts

    answers, parts = asyncio.run(ask())
    assert [a.text for a in answers] == [wanted.text] * 3
    assert parts[-1] == answers[0]
    assert "".join(part.text for part in parts[:-1]) == wanted.text


def test_what_a_ref_stands_for_is_looked_up_for_each_request(published, tmp_path):
    made = type(published)(tmp_path)
    made.publish("law", seed=1)
    engine = Engine(BASE, store=made.store, dtype="fp32", rows=4)

    def ask(adapter="law", tokens=6):
        return engine.run([Request(text="The parties agree", adapter=adapter, max_new_tokens=tokens)])[0]

    before = ask()
    assert before.digest == made.store.get("local/law@1.0.0").digest
    assert before.adapter == "law"
    begun, answer = threading.Event(), Future()
    under_way = Request(text="The parties agree", adapter="law", max_new_tokens=150)
    engine.submit(under_way, answer.set_result, lambda _: begun.set())
    assert begun.wait(LONG)
    second = made.publish("law", seed=2, version="1.1.0")
    after = ask()
    assert after.digest == second.digest != before.digest
    assert after.text != before.text
    ended = answer.result(LONG)
    assert ended.digest == before.digest
    assert ended.text == ask("law@1.0.0", 150).text
    made.store.tag("local/law@1.0.0", "stable")
    assert ask("law@stable").digest == before.digest
    made.store.tag("local/law@1.1.0", "stable")
    assert ask("law@stable").digest == after.digest
    made.store.yank("local/law@1.1.0", "broken")
    assert ask().digest == before.digest
    mixed = ask("0.5 * law@1.0.0 + law@1.1.0").digest
    assert mixed not in (None, before.digest, after.digest)
    engine.sources.pinned = True
    made.store.yank("local/law@1.1.0", None)
    assert ask().digest == before.digest
    engine.close()


def test_an_engine_drains_what_it_has_and_takes_no_more(store):
    engine = Engine(BASE, store=store.store, dtype="fp32", rows=4)
    answers = [Future() for _ in range(3)]
    for answer in answers:
        engine.submit(Request(text="To be", adapter="lora", max_new_tokens=20), answer.set_result)
    assert engine.drain(LONG)
    assert [answer.result(1).written for answer in answers] == [20, 20, 20]
    with pytest.raises(ServerStopped):
        engine.submit(Request(text="To be"), print)
    engine.close()

    engine = Engine(BASE, store=store.store, dtype="fp32", rows=4)
    cut = Future()
    engine.submit(Request(text="To be", adapter="lora", max_new_tokens=500), cut.set_result)
    assert not engine.drain(0.05)
    engine.close()
    assert isinstance(cut.result(LONG), ServerStopped)
