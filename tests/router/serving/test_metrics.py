"""What /metrics says, in the eyes of Prometheus' own parser."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `server` is not installed")

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from router.engine.engine import Engine
from router.serving.app import create_app

BASE = "builtin:tiny-lm"


class Scrape:
    def __init__(self, client):
        self.answer = client.get("/metrics")
        self.families = {family.name: family for family in text_string_to_metric_families(self.answer.text)}
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name, **labels):
        return self.samples.get((f"moduloom_{name}", tuple(sorted(labels.items()))))

    def digests(self):
        return {value for _, labels in self.samples for key, value in labels if key == "digest"}


def until(client, true):
    end = time.monotonic() + 10
    while not true(scrape := Scrape(client)):  # counted just after the answer
        assert time.monotonic() < end, scrape.answer.text
        time.sleep(0.02)
    return scrape


def ask(client, model, **fields):
    return client.post(
        "/v1/completions", json={"model": model, "prompt": "To be", "max_tokens": 4, "temperature": 0, **fields}
    ).json()


@pytest.fixture
def client(published):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=4, tokens=512)
    with TestClient(create_app(engine, waiting=8)) as client:
        client.engine = engine
        yield client


def test_each_adapter_has_its_rows_tokens_and_times(client, published):
    digest = published.store.get("law").digest
    usage = ask(client, "law", n=2, temperature=1)["usage"]
    client.post("/v1/embeddings", json={"model": "law", "input": "To be"})
    ask(client, BASE)
    seen = until(client, lambda s: s("adapter_rows_total", digest="base", outcome="answered") == 1)
    assert seen.answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert seen("adapter_rows_total", digest=digest, outcome="answered") == 3
    assert seen("adapter_tokens_total", digest=digest, kind="generated") == usage["completion_tokens"]
    assert seen("adapter_queue_seconds_count", digest=digest) == 3
    assert seen("adapter_first_token_seconds_count", digest=digest) == 2  # a vector has no token
    assert seen("adapter_first_token_seconds_bucket", digest=digest, le="+Inf") == 2
    assert seen("first_text_seconds_count") == 3
    assert 0 < seen("first_text_seconds_sum") < seen("row_seconds_sum") + 1e-9
    assert seen("requests_total", path="/v1/completions", status="200") == 2
    assert not any(name.endswith("_created") for name, _ in seen.samples)


def test_bounds_stand_beside_what_is_used(client):
    engine = client.engine
    seen = Scrape(client)
    for name, bound in (("running_rows", 4), ("waiting_rows", 8), ("cache_places", 512)):
        assert seen(name) == 0 and seen(f"{name}_bound") == bound
    assert seen("resident_bytes_bound") == -1 and seen("ready") == 1
    engine.scheduler.drain(0)
    assert Scrape(client)("ready") == 0
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


def test_places_are_counted_while_rows_run(client):
    body = {"model": "law", "prompt": "To be", "max_tokens": 400, "temperature": 1.5, "seed": 1}
    seen = []
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and not seen:
                seen.append(client.engine.scheduler.admission.places)
    assert 400 < seen[0] <= 512
    assert until(client, lambda s: s("running_rows") == 0)("cache_places") == 0


def test_an_adapter_that_leaves_the_memory_takes_its_series_along(client, published):
    engine = client.engine
    law, tone = (published.store.get(name).digest for name in ("law", "tone"))
    engine.residency.budget = engine.sources.known("law").bytes
    ask(client, "law")
    ask(client, "0.5 * law")
    before = until(client, lambda s: len(s.digests()) == 2)
    assert law in before.digests()
    ask(client, "code")  # makes room by evicting
    ask(client, "tone")
    after = until(client, lambda s: tone in s.digests())
    assert law not in after.digests() and len(after.digests()) <= 2
    assert after("adapter_evictions_total") >= 1


def test_rows_that_fail_are_counted_as_that(client, published, monkeypatch):
    from router.engine.batches.running_row import RunningRow

    monkeypatch.setattr(RunningRow, "take", lambda self, *_: self.fail())
    assert "NaN" in ask(client, "law")["error"]["message"]
    digest = published.store.get("law").digest
    assert until(client, lambda s: s("adapter_rows_total", digest=digest, outcome="failed") == 1)


def test_digests_are_bounded(client, monkeypatch):
    monkeypatch.setattr("router.serving.metrics.MOST_DIGESTS", 2)
    for factor in range(1, 5):
        ask(client, f"0.{factor} * law")
    seen = until(client, lambda s: s("adapter_rows_total", digest="other", outcome="answered") == 2)
    assert len(seen.digests()) == 3
