"""The engine: rows of any mixture of adapters over one base.

>>> engine = Engine("builtin:tiny-lm")
>>> engine.run([Request(text="To whom it may", adapter="legal"), Request(text="def main", adapter="0.5 * code + py")])
[Result(text=...), Result(text=...)]
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from transformers import PreTrainedModel

from compose.planning.members import AdapterSource
from hub.errors import HubError
from hub.store import Store
from router.engine.asking import answer_of, stream_of
from router.engine.chooser import asks
from router.engine.host import Host
from router.engine.job import Answer, Job
from router.engine.prepare import PreparedRow, prepare
from router.engine.readers import Readers
from router.engine.request import Piece, Request, Result
from router.engine.residency import Residency
from router.engine.schedule import batches
from router.engine.scheduler import Scheduler
from router.engine.sources import KnownAdapter, Sources
from router.engine.targets import Targets

T = TypeVar("T")
TOKENS = 16_384  # places of the caches, where a base does not read more


class Engine:
    """Many adapters over one base, computed together.

    Parameters
    ----------
    base, quantize, dtype, device, tokenizer
        See `compose.load`; a model in memory needs its tokenizer given.
    store
        Where refs are looked up (default: the user's own).
    adapters
        Adapters by names of their own: in memory, artifacts, directories or refs.
    resident
        Bytes of adapters kept in memory; None keeps all that were used.
    rows, tokens
        Bounds: rows of a batch (each expert of an ensemble counts as one), and places of all caches together: rows
        times the tokens that the longest of them reads and may write (None: 16,384, or a longer base's context).
        With them a cache takes tokens x layers x 2 x kv_heads x head_dim x itemsize bytes at most.
    allow_base_drift
        Accept adapters trained on other weights of the same architecture.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel,
        *,
        store: Store | None = None,
        adapters: Mapping[str, AdapterSource] | None = None,
        quantize: str = "none",
        dtype: Any = None,
        device: Any = None,
        tokenizer: Any = None,
        resident: int | None = None,
        rows: int = 32,
        tokens: int | None = None,
        allow_base_drift: bool = False,
    ) -> None:
        self.host = Host(base, quantize=quantize, dtype=dtype, device=device, tokenizer=tokenizer)
        self.sources = Sources(self.host, store or Store(), adapters)
        self.readers = Readers(self.host, budget=resident)
        self.targets = Targets(self.host, self.sources, self.readers, allow_base_drift=allow_base_drift)
        self.residency = Residency(self.host, budget=resident)
        self.rows, self.tokens = rows, max(TOKENS, self.host.context or 0) if tokens is None else tokens
        self.scheduler = Scheduler(self.host, self.sources, self.residency, rows=rows, tokens=self.tokens)

    def prepare(self, request: Request) -> PreparedRow:
        """Look up what a row names and encode it. Raises HubError for this row alone; from any thread."""
        return prepare(self.host, request, self.targets.get(request.adapter))

    def run(
        self, requests: Sequence[Request], *, done: Callable[[int, Answer], None] | None = None, strict: bool = True
    ) -> list[Answer]:
        """Compute rows in batches of like length; results are in the order of the requests.

        Parameters
        ----------
        done
            Called with the index and the answer of each row as soon as it is there.
        strict
            Raise the first error; else it stands in the place of that row's result.
        """
        answers: dict[int, Answer] = {}

        def tell(index: int, answer: Answer) -> None:
            if strict and isinstance(answer, HubError):
                raise answer
            answers[index] = answer
            if done is not None:
                done(index, answer)

        ready: dict[int, PreparedRow] = {}
        for index, request in enumerate(requests):
            try:
                ready[index] = self.prepare(request)
            except HubError as error:
                tell(index, error)
        order = list(ready)
        rows: list[PreparedRow] = []
        for index, routed in zip(ready, self.route(list(ready.values())), strict=True):
            if isinstance(routed, HubError):
                tell(index, routed)
                order.remove(index)
            else:
                rows.append(routed)
        cut = self.batches(rows)
        for number, batch in enumerate(cut):
            following = [rows[i] for i in cut[number + 1]] if number + 1 < len(cut) else []
            for i, answer in zip(batch, self.compute([rows[i] for i in batch], following), strict=True):
                tell(order[i], answer)
        return [answers[index] for index in range(len(requests))]

    def submit(
        self,
        request: Request | PreparedRow,
        on_done: Callable[[Answer], None],
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Job:
        """Queue one row. What is given is called in the engine's thread, so it must return at once.

        Raises
        ------
        HubError
            What it names cannot run, ServerBusy where too many wait, TooLarge for one that can never fit,
            ServerStopped after :meth:`close`.
        """
        row = self.prepare(request) if isinstance(request, Request) else request
        return self.scheduler.submit(row, on_done, on_piece)

    def cancel(self, job: Job) -> None:
        """Compute a row no more and say nothing more of it."""
        self.scheduler.cancel(job)

    def drain(self, grace: float) -> bool:
        """Take no more rows, and end those there are within so many seconds; whether all have ended.

        What is left after it is told ServerStopped by :meth:`close`.
        """
        return self.scheduler.drain(grace)

    async def answer(self, request: Request) -> Result:
        """The result of one row. A task that is cancelled gives its row up. Raises HubError."""
        return await answer_of(self.scheduler, self.prepare, request)

    def stream(self, request: Request) -> AsyncIterator[Piece | Result]:
        """Pieces of text as they come, and the result last. Raises HubError; leaving the loop gives the row up."""
        return stream_of(self.scheduler, self.prepare, request)

    def call(self, function: Callable[[], T]) -> T:
        """What a function gives that is called between two steps, in the thread that owns the base."""
        return self.scheduler.call(function).result()

    def route(self, rows: Sequence[PreparedRow]) -> list[PreparedRow | HubError]:
        """Let routers choose for the rows that are open; the others come back as they are."""
        return self.call(lambda: self.scheduler.admission.chooser.route(rows)) if any(map(asks, rows)) else list(rows)

    def batches(self, rows: Sequence[PreparedRow]) -> list[list[int]]:
        """Which rows are computed together, by index."""
        return batches(rows, most=self.rows, tokens=self.tokens, fits=self._fit)

    def compute(self, batch: Sequence[PreparedRow], following: Sequence[PreparedRow] = ()) -> list[Answer]:
        """Compute rows together while the adapters of those that follow are read; an error belongs to its row."""
        ended: SimpleQueue[tuple[int, Answer]] = SimpleQueue()
        told = [partial(_put, ended, index) for index in range(len(batch))]
        jobs = self.scheduler.submit_together(batch, told, following)
        try:
            answers = dict(ended.get() for _ in jobs)
        except BaseException:
            for job in jobs:
                self.scheduler.cancel(job)
            raise
        return [answers[index] for index in range(len(batch))]

    def needed(self, rows: Sequence[PreparedRow]) -> list[KnownAdapter]:
        """Adapters that rows use, each once."""
        return self.scheduler.admission.needed(rows)

    def _fit(self, names: Collection[str]) -> bool:
        return self.residency.fits(self.sources.named(name) for name in names)

    def close(self) -> None:
        """Stop the engine's threads and leave the base with nothing active."""
        self.scheduler.stop()
        self.residency.close()
        self.host.rest()


def _put(queue: SimpleQueue[tuple[int, Answer]], index: int, answer: Answer) -> None:
    queue.put((index, answer))
