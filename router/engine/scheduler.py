"""The thread that owns the base: requests that wait are computed together, and join between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from hub.errors import HubError
from router.engine.chooser import Chooser
from router.engine.host import Host
from router.engine.job import BREAKDOWNS, Answer, Job, ServerBusy, ServerStopped, Watcher, as_hub_error
from router.engine.prepare import PreparedRow
from router.engine.request import Piece
from router.engine.residency import Residency
from router.engine.running_batch import RunningBatch, RunningRow
from router.engine.sources import KnownAdapter, Sources

T = TypeVar("T")
_LINGER = 5.0  # seconds without work after which the thread ends; the next request starts another


class Scheduler:
    """Rows in, answers out.

    Attributes
    ----------
    waiting
        Requests that may wait; more are refused with `ServerBusy`.
    watchers
        Are told what happens.
    """

    def __init__(
        self, host: Host, sources: Sources, residency: Residency, *, rows: int, tokens: int, waiting: int = 1024
    ) -> None:
        self.host, self.sources, self.residency = host, sources, residency
        self.rows, self.tokens, self.waiting = rows, tokens, waiting
        self.chooser = Chooser(host, residency, rows=rows, tokens=tokens)
        self.watchers: list[Watcher] = []
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._ended: list[Job] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._ending = self._held = False
        self._batch = RunningBatch(host)
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Let requests wait until :meth:`start`."""
        self._held = True

    def start(self) -> None:
        """Compute what waits; a request starts the thread by itself otherwise."""
        with self._change:
            self._held = False
            self._wake()

    def stop(self) -> None:
        """End; what is under way is given up."""
        with self._change:
            self._ending = True
            self._change.notify_all()
            thread = self._thread
        if thread is None:
            self._give_up()
        else:
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._ending

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that are computed, and that wait."""
        return len(self._running), len(self._waiting)

    def submit(
        self, prepared: PreparedRow, on_done: Callable[[Answer], None], on_piece: Callable[[Piece], None] | None = None
    ) -> Job:
        """Queue a row; its adapters begin to be read now. Raises ServerBusy or ServerStopped."""
        with self._change:
            if len(self._waiting) >= self.waiting:
                raise ServerBusy(f"{self.waiting} requests are waiting already", hint="try again later")
            (job,) = self._queue([Job(RunningRow(prepared, self.host.tokenizer, on_piece), on_done, monotonic())])
        self.residency.prefetch(self.needed([prepared]))
        return job

    def submit_together(
        self, rows: Sequence[PreparedRow], on_done: Sequence[Callable[[Answer], None]], following: Sequence[PreparedRow]
    ) -> list[Job]:
        """Queue rows of a file, however many wait: whoever submits them waits for them before the next."""
        told = zip(rows, on_done, strict=True)
        jobs = [Job(RunningRow(row, self.host.tokenizer), done, monotonic(), following=following) for row, done in told]
        with self._change:
            return self._queue(jobs)

    def _queue(self, jobs: list[Job]) -> list[Job]:
        if self._ending:
            raise ServerStopped("the engine has stopped")
        self._waiting += jobs
        self._wake()
        return jobs

    def _wake(self) -> None:
        """With the lock: let the thread look, or begin one."""
        if self._thread is None and not self._held:
            self._thread = threading.Thread(target=self._loop, name="moduloom-engine", daemon=True)
            self._thread.start()
        self._change.notify_all()

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
            except (HubError, *BREAKDOWNS) as error:
                done.set_exception(error)

        with self._change:
            if self._ending:
                raise ServerStopped("the engine has stopped")
            self._calls.append(run)
            self._wake()
        return done

    def needed(self, rows: Sequence[PreparedRow]) -> list[KnownAdapter]:
        """Adapters that rows use, each once."""
        return [self.sources.named(name) for name in dict.fromkeys(n for row in rows for n in row.target.names)]

    # -- the thread ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException:
            self._ending = True
            raise
        finally:
            if self._ending:
                self._give_up()

    def _give_up(self) -> None:
        with self._change:
            self._ending = True
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in left:
            job.tell(ServerStopped("the engine has stopped"))

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
        """Whether there is something to do; the thread ends where there is nothing for a while."""
        with self._change:
            while not (self._ending or self._waiting or self._running or self._ended or self._calls):
                if not self._change.wait(_LINGER):
                    self._thread = None
                    return False
            return not self._ending

    def _admit_waiting(self) -> None:
        """Take in as many waiting rows as fit beside those under way; the first that does not holds up the rest.

        While rows are under way, one whose adapters are not read yet lets the others go first.
        """
        jobs: list[Job] = []
        with self._change:
            room = self.rows - self._batch.running
            for job in list(self._waiting):
                needed = self.needed([job.row.prepared])
                # Waiting for a disk would hold up the rows under way, so this one is read and passed over.
                if self._running and not self.residency.ready(needed):
                    self.residency.prefetch(needed, due=True)
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
        for job, routed in zip(jobs, self.chooser.route([job.row.prepared for job in jobs]), strict=True):
            if isinstance(routed, HubError):
                self._tell(job, routed)
            else:
                job.row.prepared = routed
                chosen.append(job)
        return chosen

    def _fits(self, rows: list[PreparedRow]) -> bool:
        tokens = len(rows) * max(len(row.ids) for row in rows)
        together = all(row.gate is rows[0].gate for row in rows) and self._batch.takes_more()
        return together and tokens <= self.tokens and self.residency.fits(self.needed(rows))

    def _admit(self, jobs: list[Job]) -> None:
        """Read rows; where the batch fails each is tried alone, so that an error belongs to the row that causes it."""
        ready: list[Job] = []
        for job in jobs:
            try:
                self.residency.acquire(self.needed([job.row.prepared]))
            except (HubError, *BREAKDOWNS) as error:
                self._tell(job, as_hub_error(error))
                continue
            job.acquired, job.began = True, monotonic()
            ready.append(job)
        self._running += ready
        if ready:
            self.residency.prefetch(self.needed(ready[-1].following))
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
            for watcher in self.watchers:
                watcher.joined(max(len(rows), self._batch.running))
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
                self._tell(job, job.row.answer)
        for job in [job for job in self._ended if job.row not in self._batch.rows]:
            self._ended.remove(job)
            self._release(job)

    def _tell(self, job: Job, answer: Answer) -> None:
        job.tell(answer)
        for watcher in self.watchers:
            watcher.ended(job)

    def _release(self, job: Job) -> None:
        if job.acquired:
            self.residency.release(self.needed([job.row.prepared]))
            job.acquired = False

    def _fail_running(self, error: HubError) -> None:
        self._batch.leave()
        for job in self._running:
            if not job.row.over:
                job.row.error = error
