"""Requests that wait are computed together: one thread, one running batch, and rows that join it between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from hub.errors import HubError
from router.engine.engine import BREAKDOWNS, Answer, Engine, as_hub_error
from router.engine.prepare import PreparedRow
from router.engine.request import Piece
from router.engine.running_batch import RunningBatch, RunningRow
from router.serving.metrics import Metrics

T = TypeVar("T")


class ServerBusy(HubError):
    """More requests wait than the server takes."""


class ServerStopped(HubError):
    """Nothing is computed any more."""


@dataclass(eq=False)
class Job:
    """A request under way. The row's ``on_piece`` and ``on_done`` are called in the batcher's thread."""

    row: RunningRow
    on_done: Callable[[Answer], None]
    since: float
    acquired: bool = False


class Batcher:
    """The thread that owns the base.

    Parameters
    ----------
    waiting
        Requests that may wait; more are refused with `ServerBusy`.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, waiting: int = 1024) -> None:
        self.engine, self.metrics, self._most = engine, metrics, waiting
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._ended: list[Job] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._ending = False
        self._batch = RunningBatch(engine.host)
        self._thread = threading.Thread(target=self._loop, name="moduloom-batcher", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is under way is given up."""
        with self._change:
            self._ending = True
            self._change.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are computed."""
        return self._thread.is_alive()

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that are computed, and that wait."""
        return len(self._running), len(self._waiting)

    def submit(
        self, prepared: PreparedRow, on_done: Callable[[Answer], None], on_piece: Callable[[Piece], None] | None = None
    ) -> Job:
        """Queue a row; its adapters begin to be read now. Raises ServerBusy or ServerStopped."""
        job = Job(RunningRow(prepared, self.engine.host.tokenizer, on_piece), on_done, monotonic())
        with self._change:
            if self._ending:
                raise ServerStopped("the server has stopped")
            if len(self._waiting) >= self._most:
                raise ServerBusy(f"{self._most} requests are waiting already", hint="try again later")
            self._waiting.append(job)
            self._change.notify()
        self.engine.residency.prefetch(self.engine.needed([prepared]))
        return job

    def cancel(self, job: Job) -> None:
        """Compute a row no more, and say nothing more of it; its place is free at once."""
        job.row.cancelled = True
        with self._change, suppress(ValueError):  # it may be under way, or have ended
            self._waiting.remove(job)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Do something between two steps, in the thread that owns the base."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except HubError as error:
                done.set_exception(error)

        with self._change:
            if self._ending:
                raise ServerStopped("the server has stopped")
            self._calls.append(run)
            self._change.notify()
        return done

    # -- the thread ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._wait():
                self._turn()
        finally:
            with self._change:
                self._ending = True
            for job in (*self._running, *self._waiting):
                job.on_done(ServerStopped("the server has stopped"))

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        try:
            self._admit_waiting()
            self._batch.step()
        except (HubError, *BREAKDOWNS) as error:
            self._fail_running(as_hub_error(error))
        self._report_ended()

    def _wait(self) -> bool:
        with self._change:
            while not (self._ending or self._waiting or self._running or self._ended or self._calls):
                self._change.wait()
            return not self._ending

    def _admit_waiting(self) -> None:
        """Take in as many waiting rows as fit beside those under way; the first that does not holds up the rest.

        While rows are under way, one whose adapters are not read yet lets the others go first.
        """
        jobs: list[Job] = []
        with self._change:
            room = self.engine.rows - self._batch.running
            for job in list(self._waiting):
                needed = self.engine.needed([job.row.prepared])
                # Waiting for a disk would hold up the rows under way, so this one is read and passed over.
                if self._running and not self.engine.residency.ready(needed):
                    self.engine.residency.prefetch(needed, due=True)
                    continue
                rows = [j.row.prepared for j in (*self._running, *jobs, job)]
                # Nobody overtakes a row that does not fit, or it might wait for ever.
                if len(jobs) >= room or (len(rows) > 1 and not self._fits(rows)):
                    break
                self._waiting.remove(job)
                jobs.append(job)
        if jobs := self._routed(jobs):
            self._admit(jobs)

    def _routed(self, jobs: list[Job]) -> list[Job]:
        """The jobs with what routers have chosen for them."""
        chosen: list[Job] = []
        for job, routed in zip(jobs, self.engine.route([job.row.prepared for job in jobs]), strict=True):
            if isinstance(routed, HubError):
                job.on_done(routed)
            else:
                job.row.prepared = routed
                chosen.append(job)
        return chosen

    def _fits(self, rows: list[PreparedRow]) -> bool:
        tokens, engine = len(rows) * max(len(row.ids) for row in rows), self.engine
        together = all(row.gate is rows[0].gate for row in rows) and self._batch.takes_more()
        return together and tokens <= engine.tokens and engine.residency.fits(engine.needed(rows))

    def _admit(self, jobs: list[Job]) -> None:
        """Read rows; where the batch fails each is tried alone, so that an error belongs to the row that causes it."""
        ready: list[Job] = []
        for job in jobs:
            try:
                self.engine.residency.acquire(self.engine.needed([job.row.prepared]))
            except (HubError, *BREAKDOWNS) as error:
                job.on_done(as_hub_error(error))
                continue
            job.acquired = True
            ready.append(job)
        self._running += ready
        rows = [job.row for job in ready]
        if not rows:
            return
        if not self._batch.joins(rows):
            self._take_out(ready)
            with self._change:
                self._waiting.extendleft(reversed(ready))  # until the others have ended
            return
        try:
            self._batch.admit(rows)
            self.metrics.batch.observe(max(len(rows), self._batch.running))
        except (HubError, *BREAKDOWNS) as error:
            if len(ready) == 1:
                rows[0].error = as_hub_error(error)
                return
            self._take_out(ready)
            for job in ready:
                self._admit([job])

    def _take_out(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._release(job)
            self._running.remove(job)

    def _report_ended(self) -> None:
        """Tell the rows that have ended; what they used is let go once they have left the batch."""
        for job in [job for job in self._running if job.row.over]:
            self._running.remove(job)
            self._ended.append(job)
            if not job.row.cancelled:
                self.metrics.seconds.observe(monotonic() - job.since)
                job.on_done(job.row.answer)
        for job in [job for job in self._ended if job.row not in self._batch.rows]:
            self._ended.remove(job)
            self._release(job)

    def _release(self, job: Job) -> None:
        if job.acquired:
            self.engine.residency.release(self.engine.needed([job.row.prepared]))
            job.acquired = False

    def _fail_running(self, error: HubError) -> None:
        self._batch.leave()
        for job in self._running:
            if not job.row.over:
                job.row.error = error
