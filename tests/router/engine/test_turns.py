"""Nothing holds up the others: rows of every kind take turns, counted in steps and not in seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from router.engine.engine import Engine
from router.engine.job import TooLarge
from router.engine.request import Request
from router.engine.turns import Turns

spec = importlib.util.spec_from_file_location("traffic", Path(__file__).with_name("traffic.py"))
traffic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(traffic)
BASE = "builtin:tiny-lm"
SOON = 12  # steps


@pytest.fixture
def engine(published, routers):
    made = Engine(BASE, store=published.store, dtype="fp32", rows=16)
    yield made
    made.close()


@pytest.mark.parametrize("other", ["law", "ensemble.demix(law, code)", "local/arrow", "lead", "long"])
def test_a_row_of_one_token_does_not_wait_for_what_came_before_it(engine, other):
    """Behind rows of another kind, or a prompt of hundreds of tokens, it is answered within a few steps."""
    text = "To be or not to be " * 60 if other == "long" else "To be"
    steps = traffic.Steps(engine)
    first = [
        steps.submit(Request(text=text, adapter=None if other == "long" else other, max_new_tokens=40))
        for _ in range(1 if other == "long" else 4)
    ]
    for _ in range(3):
        steps.turn()
    assert not any(job.row.over for job in first)
    plain = steps.submit(Request(text="The court", adapter="code", max_new_tokens=1))
    assert steps.until(plain) <= SOON
    assert not all(job.row.over for job in first)
    for job in first:
        steps.until(job)
    alone = engine.run([Request(text="The court", adapter="code", max_new_tokens=1)])[0]
    assert plain.row.answer.text == alone.text


def test_every_kind_gets_on_while_the_others_do(engine):
    names = ["law", "local/arrow", "ensemble.mean(law, code)", "tone"]
    steps = traffic.Steps(engine)
    jobs = [steps.submit(Request(text="To be", adapter=name, max_new_tokens=30)) for name in names]
    while min(job.row.written for job in jobs) < 10:
        steps.turn()
    assert not any(job.row.over for job in jobs)
    assert max(job.row.written for job in jobs) < 30


def test_turns_are_shared_by_time_and_what_is_new_does_not_catch_up():
    turns, had = Turns(), {"slow": 0.0, "quick": 0.0}
    costs = {"slow": 5.0, "quick": 1.0, "late": 1.0}
    for _ in range(600):
        one = turns.next(list(had))
        turns.charge(one, costs[one])
        had[one] += costs[one]
    assert had["slow"] == pytest.approx(had["quick"], rel=0.02)
    had["late"] = 0.0
    for _ in range(700):
        one = turns.next(list(had))
        turns.charge(one, costs[one])
        had[one] += costs[one]
    assert had["late"] == pytest.approx(had["slow"] - 500, rel=0.1)


def test_newcomers_without_end_starve_nobody():
    turns, served = Turns(), 0
    for n in range(1000):
        one = turns.next([f"new {n}", "old"])
        turns.charge(one, 1.0)
        served += one == "old"
    assert served > 300


def test_what_comes_alone_waits_for_one_step_however_much_came_before_it():
    turns = Turns()
    for n in range(100):
        for _ in range(1 + n % 3):
            turns.charge(turns.next(["old"]), 1.0)
        assert turns.next(["old", f"new {n}"]) == f"new {n}"
        turns.charge(f"new {n}", 5.0)


def test_routers_choose_for_as_much_as_a_chunk_while_others_write(engine):
    steps = traffic.Steps(engine)
    writes = steps.submit(Request(text="To be", adapter="law", max_new_tokens=60))
    while not writes.row.written:
        steps.turn()
    long = "The parties to this agreement shall be governed by the laws of the state " * 5
    jobs = [steps.submit(Request(text=long, adapter="local/near", max_new_tokens=1)) for _ in range(6)]
    steps.turn()
    assert sum(job.row.prepared.open for job in jobs) == 5
    before = writes.row.written
    for job in jobs:
        steps.until(job)
    assert writes.row.written - before >= 5


@pytest.mark.parametrize("chunk", [8, 33, 4096])
def test_chunks_do_not_change_an_answer(engine, chunk):
    text = "The parties to this agreement shall be governed by the laws of the state " * 4
    names = ["law", "lead", "mood", "ensemble.demix(law, code)", "local/arrow"]
    steps = traffic.Steps(engine)
    wanted = engine.run([Request(text=text, adapter=name, max_new_tokens=5, scores=1) for name in names])
    steps.work.pace.least = steps.work.pace.most = steps.work.pace.first = chunk
    jobs = [steps.submit(Request(text=text, adapter=name, max_new_tokens=5, scores=1)) for name in names]
    for job in jobs:
        steps.until(job)
    for job, answer in zip(jobs, wanted, strict=True):
        assert (job.row.answer.text, job.row.answer.label) == (answer.text, answer.label)
        told = [t.log_prob for t in job.row.answer.tokens]
        assert told == pytest.approx([t.log_prob for t in answer.tokens], abs=1e-3)


def test_what_can_never_fit_is_refused_and_the_rest_stays_within_the_bound(published):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=8, tokens=120)
    with pytest.raises(TooLarge, match="more than the 120 that this engine holds"):
        engine.submit(Request(text="To be", max_new_tokens=200), print)
    with pytest.raises(TooLarge, match="2 experts x"):
        engine.submit(Request(text="To be", adapter="ensemble.mean(law, code)", max_new_tokens=80), print)
    steps = traffic.Steps(engine)
    jobs = [steps.submit(Request(text="To be", adapter="law", max_new_tokens=10 + 9 * i)) for i in range(9)]
    while not all(job.row.over for job in jobs):
        steps.turn()
        rows = steps.work.rows_of(None)
        assert len(rows) * max((row.prepared.places for row in rows), default=0) <= 120
    engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_cache_takes_what_its_rows_take(engine, seed):
    """bytes(rows, longest) bounds the cache at each step, whoever joins and leaves; the empty places in front go."""
    draw = torch.Generator().manual_seed(seed)
    config = engine.host.model.config
    each = config.num_hidden_layers * 2 * config.num_key_value_heads * 4
    each *= getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    steps, jobs, widths = traffic.Steps(engine), [], []
    for turn in range(160):
        if turn < 120 and int(torch.randint(4, (), generator=draw)) == 0:
            words, new = (int(n) for n in torch.randint(1, 30, (2,), generator=draw))
            name = [None, "law", "tone", "lead"][turn % 4]
            jobs.append(steps.submit(Request(text="be " * words, adapter=name, max_new_tokens=new)))
        steps.turn()
        for batch in steps.work.batches:
            lanes, most = len(batch.rows), max(row.prepared.places for row in batch.rows)
            assert batch.state.bytes <= lanes * most * each
            assert batch.state.width <= most
            widths.append(batch.state.width)
    for job in jobs:
        steps.until(job)
    assert max(widths) <= 64  # not one after the other's
    alone = [engine.run([job.row.prepared.request])[0].text for job in jobs]
    assert [job.row.answer.text for job in jobs] == alone
