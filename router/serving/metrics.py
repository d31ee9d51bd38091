"""Counts of a server for Prometheus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.engine.engine import Engine
from router.engine.job import Job
from router.engine.request import Result

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "moduloom_"
MOST_DIGESTS = 1000  # told apart; rows of others are counted under "other"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_QUEUED = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ADAPTER = (0.05, 0.25, 1, 5)  # few, as there is a series for each adapter and bound


class Metrics:
    """What a server counts. Series of a digest go when one of its adapters leaves the memory."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, meaning, labels, registry=self._registry)

        def histogram(name: str, meaning: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, meaning, labels, buckets=bounds, registry=self._registry)

        self.requests = counter("requests_total", "Answers by path and status.", "path", "status")
        self._read = counter("prompt_tokens_total", "Tokens read.")
        self._written = counter("generated_tokens_total", "Tokens written.")
        self._seconds = histogram("row_seconds", "Seconds from a row's request to its end.", _SECONDS)
        self._first = histogram("first_text_seconds", "Seconds from a row's request to its first token.", _FIRST)
        self._queued = histogram("queue_seconds", "Seconds from a row's request until its prompt is read.", _QUEUED)
        self._batch = histogram("batch_rows", "Rows computed together when some joined.", (1, 2, 4, 8, 16, 32, 64, 128))
        self._rows = counter("adapter_rows_total", "Rows that have ended, by what answered.", "digest", "outcome")
        self._tokens = counter("adapter_tokens_total", "Tokens of such rows, by what answered.", "digest", "kind")
        self._adapter_queue = Summary(
            PREFIX + "adapter_queue_seconds", "Seconds in the queue.", ["digest"], registry=self._registry
        )
        self._adapter_first = histogram(
            "adapter_first_token_seconds", "Seconds to the first token.", _ADAPTER, "digest"
        )
        self._registry.register(_EngineState(engine))
        self._digests: dict[str, set[str]] = defaultdict(set)  # of each resident, what it is part of
        self._told_apart: set[str] = set()
        engine.scheduler.watchers.append(self)
        engine.residency.on_gone.append(self.gone)

    def count(self, read: int, written: int) -> None:
        """Tokens of a request."""
        self._read.inc(read)
        self._written.inc(written)

    def joined(self, rows: int) -> None:
        """Rows have joined others: so many are computed together now."""
        self._batch.observe(rows)

    def ended(self, job: Job) -> None:
        """A row has been answered."""
        answer, target = job.row.error or job.row.result, job.row.prepared.target
        digest = self._digest(target.digest or ("unknown" if target.text else "base"), target.names)
        good = isinstance(answer, Result)
        self._rows.labels(digest, "answered" if good else "failed").inc()
        if job.ended is not None:
            self._seconds.observe(job.ended - job.since)
        if job.began is not None:
            self._queued.observe(job.began - job.since)
            self._adapter_queue.labels(digest).observe(job.began - job.since)
        if job.row.first is not None:
            self._first.observe(job.row.first - job.since)
            self._adapter_first.labels(digest).observe(job.row.first - job.since)
        if isinstance(answer, Result):
            self._tokens.labels(digest, "prompt").inc(answer.read)
            self._tokens.labels(digest, "generated").inc(answer.written)

    def _digest(self, digest: str, names: tuple[str, ...]) -> str:
        if digest not in self._told_apart and len(self._told_apart) >= MOST_DIGESTS:
            return "other"
        self._told_apart.add(digest)
        for name in names:
            self._digests[name].add(digest)
        return digest

    def gone(self, name: str) -> None:
        """A resident has left the memory."""
        for digest in self._digests.pop(name, set()) - {"base", "unknown", "other"}:
            self._told_apart.discard(digest)
            for metric in (self._rows, self._tokens, self._adapter_queue, self._adapter_first):
                metric.remove_by_labels({"digest": digest})

    def text(self) -> bytes:
        """All of it in Prometheus' text format (version 0.0.4)."""
        return generate_latest(_WithoutTimes(self._registry))


class _WithoutTimes:
    """Metrics without a series for the time at which each began."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _EngineState:
    """What the engine knows itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing before it is asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters, as they stand."""
        scheduler, residency = self._engine.scheduler, self._engine.residency
        running, waiting = scheduler.counts
        counts = residency.counts
        for name, meaning, value in (
            ("ready", "1 while requests are taken.", scheduler.alive),
            ("running_rows", "Rows that are computed.", running),
            ("running_rows_bound", "The most rows of a batch.", scheduler.admission.rows),
            ("waiting_rows", "Rows that wait.", waiting),
            ("waiting_rows_bound", "The most that may wait.", scheduler.waiting),
            ("cache_places", "Tokens that caches are set aside for.", scheduler.admission.places),
            ("cache_places_bound", "The most that there may be.", scheduler.admission.tokens),
            ("cache_bytes", "Bytes of the caches.", scheduler.work.bytes),
            ("resident_adapters", "Adapters in memory.", len(residency.resident)),
            ("resident_bytes", "Bytes of their tensors.", residency.bytes),
            ("resident_bytes_bound", "The most bytes kept; -1: no bound.", residency.budget or -1),
        ):
            yield GaugeMetricFamily(PREFIX + name, meaning, value)
        for name, meaning, value in (
            ("adapter_hits_total", "Adapters asked for that were in memory.", counts.hits),
            ("adapter_reads_total", "Adapters read from disk.", counts.read),
            ("adapter_evictions_total", "Adapters that made room.", counts.evicted),
        ):
            yield CounterMetricFamily(PREFIX + name, meaning, value)
