"""Counts of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from router.engine.job import Job
from router.engine.request import Result

PREFIX = "moduloom_"
MOST_DIGESTS = 1000  # told apart; tokens of others are counted under "other"


class Histogram:
    """Counts of observations up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """What a server counts.

    Attributes
    ----------
    requests
        (path, status) -> answers.
    read, written
        Tokens of prompts and of continuations.
    seconds, first, queued
        Seconds to the end of a row, to its first text, and until its prompt began to be read.
    tokens
        (digest of what answered, "prompt" or "generated") -> tokens; the bare base's digest is "base".
    batch
        Rows computed together when some joined.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.read = self.written = 0
        self.seconds = Histogram((0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120))
        self.first = Histogram((0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10))
        self.queued = Histogram((0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60))
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.batch = Histogram((1, 2, 4, 8, 16, 32, 64, 128))

    def joined(self, rows: int) -> None:
        """Rows have joined others: so many are computed together now."""
        self.batch.observe(rows)

    def ended(self, job: Job) -> None:
        """A row has been answered."""
        if job.ended is not None:
            self.seconds.observe(job.ended - job.since)
        if job.began is not None:
            self.queued.observe(job.began - job.since)
        answer = job.row.result
        if isinstance(answer, Result):
            digest = answer.digest or ("unknown" if answer.adapter else "base")
            if (digest, "prompt") not in self.tokens and len(self.tokens) >= 2 * MOST_DIGESTS:
                digest = "other"
            self.tokens[digest, "prompt"] += answer.read
            self.tokens[digest, "generated"] += answer.written

    def text(self, gauges: Iterable[tuple[str, str, float]], counters: Iterable[tuple[str, str, float]]) -> str:
        """All of it, with gauges and counters (name, help, value) that others keep."""
        lines = [*self._requests(), *self._digests()]
        for kind, rows in (("gauge", gauges), ("counter", [*counters, *self._tokens()])):
            for name, meaning, value in rows:
                lines += _head(name, meaning, kind)
                lines.append(f"{PREFIX}{name} {value:g}" if kind == "gauge" else f"{PREFIX}{name} {int(value)}")
        lines += _histogram("row_seconds", "Seconds from a request to its last token.", self.seconds)
        lines += _histogram("first_text_seconds", "Seconds from a request to its first text.", self.first)
        lines += _histogram("queue_seconds", "Seconds from a request until its prompt is read.", self.queued)
        lines += _histogram("batch_rows", "Rows computed together when some joined.", self.batch)
        return "\n".join(lines) + "\n"

    def _tokens(self) -> list[tuple[str, str, float]]:
        return [
            ("prompt_tokens_total", "Tokens read.", self.read),
            ("generated_tokens_total", "Tokens written.", self.written),
        ]

    def _requests(self) -> Iterator[str]:
        yield from _head("requests_total", "Answers by path and status.", "counter")
        for (path, status), count in sorted(self.requests.items()):
            yield f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}'

    def _digests(self) -> Iterator[str]:
        yield from _head("adapter_tokens_total", "Tokens of rows that have ended, by what answered.", "counter")
        for (digest, kind), count in sorted(self.tokens.copy().items()):  # the engine's thread counts on meanwhile
            yield f'{PREFIX}adapter_tokens_total{{digest="{digest}",kind="{kind}"}} {count}'


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {meaning}", f"# TYPE {PREFIX}{name} {kind}"]


def _histogram(name: str, meaning: str, histogram: Histogram) -> Iterator[str]:
    yield from _head(name, meaning, "histogram")
    running = 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        running += count
        yield f'{PREFIX}{name}_bucket{{le="{bound}"}} {running}'
    yield f"{PREFIX}{name}_sum {histogram.total:g}"
    yield f"{PREFIX}{name}_count {running}"
