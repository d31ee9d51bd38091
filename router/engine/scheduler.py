"""The thread that owns the base: rows come in, take turns, and leave when they have ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TypeVar

from hub.errors import HubError
from router.engine.admission import Admission
from router.engine.batches.running_row import RunningRow
from router.engine.host import Host
from router.engine.job import BREAKDOWNS, Answer, Job, ServerBusy, ServerStopped, Watcher
from router.engine.prepare import PreparedRow
from router.engine.request import Piece
from router.engine.residency import Residency
from router.engine.sources import Sources
from router.engine.work import Work

T = TypeVar("T")
_LINGER = 5.0  # seconds without work after which the thread ends; the next request starts another
_LOOK = 0.1  # seconds to wait for an adapter to be read, where there is nothing else to do
_DRAINING = 0.02  # seconds between two looks whether all has ended


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
        self.host, self.waiting = host, waiting
        self.watchers: list[Watcher] = []
        self.work = Work(host, self._joined)
        self.admission = Admission(host, sources, residency, self.work, rows=rows, tokens=tokens)
        self._waiting: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._ending = self._held = self._draining = False
        self._thread: threading.Thread | None = None
        self._to_say: list[Callable[[], None]] = []  # once nothing is in hand that whoever hears it may want
        residency.on_read = self._look

    # -- from any thread -------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Let requests, and what is under way, wait until :meth:`start`."""
        self._held = True

    def start(self) -> None:
        """Compute what waits; a request starts the thread by itself otherwise."""
        with self._change:
            self._held = False
            self._wake()

    def drain(self, grace: float) -> bool:
        """Take no more requests, and end those there are within so many seconds; whether all have ended."""
        with self._change:
            self._draining = True
        until = monotonic() + grace
        while any(self.counts) and monotonic() < until:
            threading.Event().wait(_DRAINING)
        return not any(self.counts)

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
        return not (self._ending or self._draining)

    @property
    def draining(self) -> bool:
        """Whether what is under way is ended, and nothing else is taken."""
        return self._draining and not self._ending

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that are computed, and that wait."""
        return len(self.work.running), len(self._waiting)

    def submit(
        self, prepared: PreparedRow, on_done: Callable[[Answer], None], on_piece: Callable[[Piece], None] | None = None
    ) -> Job:
        """Queue a row; its adapters begin to be read now. Raises TooLarge, ServerBusy or ServerStopped."""
        self.admission.refuse_too_large(prepared)
        with self._change:
            if len(self._waiting) >= self.waiting:
                raise ServerBusy(f"{self.waiting} requests are waiting already", hint="try again later")
            (job,) = self._queue([Job(RunningRow(prepared, self.host.tokenizer, on_piece), on_done, monotonic())])
        self.admission.prefetch([prepared])
        return job

    def submit_together(
        self, rows: Sequence[PreparedRow], on_done: Sequence[Callable[[Answer], None]], following: Sequence[PreparedRow]
    ) -> list[Job]:
        """Queue rows of a file, however many wait: whoever submits them waits for them before the next."""
        told = zip(rows, on_done, strict=True)
        jobs = [Job(RunningRow(row, self.host.tokenizer), done, monotonic(), following=following) for row, done in told]
        for job in jobs:
            job.together = jobs
        with self._change:
            return self._queue(jobs)

    def _queue(self, jobs: list[Job]) -> list[Job]:
        if self._ending or self._draining:
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

    def _look(self) -> None:
        """An adapter has been read."""
        with self._change:
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
                self._to_say.append(partial(done.set_result, function()))
            except (HubError, *BREAKDOWNS) as error:
                self._to_say.append(partial(done.set_exception, error))

        with self._change:
            if self._ending:
                raise ServerStopped("the engine has stopped")
            self._calls.append(run)
            self._wake()
        return done

    # -- the thread ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._wait():
                with self.host.in_hand():
                    while self._is_busy():
                        self._say()
                        self._turn()
                self._say()  # whoever is told that all is done may use the base at once
        except BaseException:
            self._ending = True
            raise
        finally:
            self._say()
            if self._ending:
                self._give_up()

    def _is_busy(self) -> bool:
        return not (self._ending or self._held) and bool(self._waiting or self.work.held or self._calls)

    def _say(self) -> None:
        said, self._to_say = self._to_say, []
        for say in said:
            say()

    def _wait(self) -> bool:
        """Whether there is something to do; the thread ends where there is nothing for a while."""
        with self._change:
            while not (self._ending or self._is_busy()):
                if not self._change.wait(_LINGER):
                    self._thread = None
                    return False
            return not self._ending

    def _turn(self) -> None:
        """Errands, admissions, and then one step of one batch or one chunk of one prompt."""
        while self._calls:
            self._calls.popleft()()
        self._sweep()
        self._admit()
        if not self.work.turn():
            with self._change:
                if self._waiting and not (self._calls or self._ending or self.work.running):
                    self._change.wait(_LOOK)
        for job in self.work.ended():
            if not job.row.cancelled:
                self._tell(job, job.row.answer)
        if not self.work.running:
            self._sweep()

    def _sweep(self) -> None:
        for job in self.work.sweep():
            self.admission.release(job)

    def _admit(self) -> None:
        with self._change:
            waiting = list(self._waiting)
        if not waiting:
            return
        for job, error in self.admission.admit(waiting):
            with self._change, suppress(ValueError):
                self._waiting.remove(job)
            if error is not None:
                self._tell(job, error)

    def _joined(self, rows: int) -> None:
        for watcher in self.watchers:
            watcher.joined(rows)

    def _tell(self, job: Job, answer: Answer) -> None:
        job.ended = monotonic()
        self._to_say.append(partial(job.tell, answer))
        self._to_say += [partial(watcher.ended, job) for watcher in self.watchers]

    def _give_up(self) -> None:
        with self._change:
            left = [*self.work.running, *self._waiting]
            self.work.running.clear()
            self._waiting.clear()
        for job in left:
            if not job.row.cancelled:
                job.tell(ServerStopped("the engine has stopped"))
