"""Adapters come from disk while others are computed, make room for each other, and fail alone."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compose
from hub.errors import HubError
from router.engine.engine import Engine
from router.engine.request import Request
from router.engine.sources import KnownAdapter

BASE = "builtin:tiny-lm"
LONG = 30  # seconds until a test that waits in vain has failed


@pytest.fixture(scope="module")
def places(published, tmp_path_factory):
    """Directories of six small adapters that all differ."""
    model, home = published.model(None), tmp_path_factory.mktemp("places")
    adapter = compose.create(model, "ia3", name="made")
    draw = torch.Generator().manual_seed(0)
    for name in "abcdef":
        for parameter in adapter.parameters():
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=draw)
        compose.save(adapter, home / name, model=model, task="causal_lm")
    compose.detach(model, "made")
    return {name: home / name for name in "abcdef"}


@pytest.fixture
def engine(published, places):
    engine = Engine(BASE, store=published.store, adapters=places, dtype="fp32", rows=2)
    yield engine
    engine.close()


@pytest.fixture
def reading(monkeypatch):
    """Events set when the reading of an adapter begins, and what it then waits for."""
    begun = {name: threading.Event() for name in "abcdef"}
    allowed = {name: threading.Event() for name in "abcdef"}
    for event in allowed.values():
        event.set()
    read = KnownAdapter.read

    def slowly(known, host):
        begun[known.name].set()
        assert allowed[known.name].wait(LONG), f"{known.name} was waited for"
        return read(known, host)

    monkeypatch.setattr(KnownAdapter, "read", slowly)
    return begun, allowed


def rows(*names, tokens=4):
    return [Request(text="It was a dark", adapter=name, max_new_tokens=tokens) for name in names]


def test_the_next_batch_is_read_while_this_one_is_computed(engine, reading):
    """The first batch does not end before the second's adapters are asked of the disk."""
    begun, _ = reading
    steps = []

    def wait(*_args):
        steps.append(1)
        if len(steps) == 2:  # between the first token and the last
            assert begun["c"].wait(LONG), "nothing is read while a batch is computed"

    hook = engine.host.model.register_forward_pre_hook(wait)
    answers = engine.run(rows("a", "b", "c", "d"))
    hook.remove()
    assert len({a.text for a in answers}) > 2
    assert engine.residency.counts.read == 4


def test_rows_under_way_do_not_wait_for_a_disk(engine, reading):
    """The server goes on with one row while another's adapter is read: it is not read before the first has ended."""
    _, allowed = reading
    allowed["b"].clear()
    ended = {name: threading.Event() for name in "ab"}
    first, second = (engine.prepare(row) for row in rows("a", "b", tokens=12))
    pieces, told = threading.Event(), {}

    def done(name):
        return lambda answer: (told.update({name: answer}), ended[name].set())

    engine.submit(first, done("a"), lambda _piece: pieces.set())
    assert pieces.wait(LONG)
    engine.submit(second, done("b"))
    assert ended["a"].wait(LONG)
    allowed["b"].set()
    assert ended["b"].wait(LONG)
    alone = engine.run(rows("a", "b", tokens=12))
    assert [told[name].text for name in "ab"] == [answer.text for answer in alone]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(st.tuples(st.sampled_from("+-!?"), st.sampled_from("abcdef")), max_size=25), room=st.integers(1, 4)
)
def test_what_is_used_stays_and_the_rest_keeps_to_the_budget(engine, moves, room):
    """Acquired and released, dropped and read ahead in any order."""
    held, size = engine.residency, max(engine.sources.known(name).bytes for name in "abcdef")
    held.budget, used = room * size, []
    for move, name in moves:
        known = engine.sources.known(name)
        if move == "+":
            held.acquire([known])
            used.append(known)
        elif move == "-" and used:
            held.release([used.pop(0)])
        elif move == "!":
            held.drop(name)
        elif move == "?":
            held.prefetch([known])
        in_use = {one.name for one in used}
        assert in_use <= set(held.resident) == set(engine.host.runtime.adapters)
        if move == "+":
            assert held.bytes <= max(held.budget, sum(engine.sources.known(one).bytes for one in in_use))
    while used:
        held.release([used.pop()])
    held.acquire([])
    assert held.bytes <= held.budget


def test_no_more_is_read_ahead_than_may_be_resident(engine, reading):
    begun, allowed = reading
    known = [engine.sources.known(name) for name in "abcdef"]
    engine.residency.budget = 2 * max(one.bytes for one in known)
    allowed["a"].clear()
    engine.residency.prefetch(known)
    assert begun["a"].wait(LONG)
    assert len(engine.residency._coming) == 2
    allowed["a"].set()
    engine.residency.acquire(known)
    assert all(one.name in engine.host.runtime.adapters for one in known)


@pytest.mark.parametrize("how", ["truncated", "deleted", "of another shape", "NaN"])
def test_a_broken_adapter_fails_its_own_rows(published, places, tmp_path, how):
    import shutil

    from safetensors.torch import load_file, save_file

    place = shutil.copytree(places["c"], tmp_path / "c")
    engine = Engine(BASE, store=published.store, adapters={**places, "c": place}, dtype="fp32", rows=4)
    asked = rows("a", "c", "b", "c", None)
    wanted = [engine.run([row])[0].text for row in asked]
    engine.residency.drop("c")
    weights = place / "adapter_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "deleted":
        weights.unlink()
    else:
        tensors = load_file(weights)
        change = (lambda t: t[:-1].clone()) if how == "of another shape" else (lambda t: t * torch.nan)
        save_file({name: change(tensor) for name, tensor in tensors.items()}, weights)
    answers = engine.run(asked, strict=False)
    assert [isinstance(answer, HubError) for answer in answers] == [False, True, False, True, False]
    assert [answers[i].text for i in (0, 2, 4)] == [wanted[i] for i in (0, 2, 4)]

    told, all_told = {}, threading.Event()
    engine.scheduler.hold()

    def tell(index):
        def done(answer):
            told[index] = answer
            if len(told) == len(asked):
                all_told.set()

        return done

    jobs = [engine.prepare(row) for row in asked]
    for index, job in enumerate(jobs):
        engine.submit(job, tell(index))
    engine.scheduler.start()
    assert all_told.wait(LONG)
    assert engine.scheduler.alive
    assert [isinstance(told[i], HubError) for i in range(5)] == [False, True, False, True, False]
    assert [told[i].text for i in (0, 2, 4)] == [wanted[i] for i in (0, 2, 4)]
    engine.close()
