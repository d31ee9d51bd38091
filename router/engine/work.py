"""What is under way: prompts that are read and batches that write, of every kind, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from hub.errors import HubError
from router.engine.batches.decoding import DecodingBatch
from router.engine.batches.prefill import Reading
from router.engine.batches.reader_rows import ReaderRows
from router.engine.batches.running_row import RunningRow
from router.engine.host import Host
from router.engine.job import BREAKDOWNS, Job, as_hub_error
from router.engine.routing import Routing
from router.engine.turns import Pace, Turns

STEADY = 512  # tokens of a chunk where a run must give the same bits each time


class Work:
    """Readings and batches that take turns.

    Attributes
    ----------
    running
        Jobs under way.
    left_over
        Jobs that have ended, and whose rows are still laid out in a batch.
    batches
        Rows that write: one batch of each gate where rows can join, else one of each that was read.
    """

    def __init__(self, host: Host, joined: Callable[[int], None]) -> None:
        self.host, self._joined = host, joined
        self.running: list[Job] = []
        self.left_over: list[Job] = []
        self.readings: list[Reading | ReaderRows] = []
        self.batches: list[DecodingBatch] = []
        self.turns, self.pace = Turns(), Pace()
        self.steps = 0

    def begin(self, jobs: Sequence[Job]) -> None:
        """Read the rows of these: those of like length, gate and use together."""
        self.running += jobs
        groups: dict[object, list[RunningRow]] = {}
        for job in jobs:
            groups.setdefault(self._alike(job.row), []).append(job.row)
        for rows in groups.values():
            self._read(rows, steady=jobs[0].together is not None)

    def _alike(self, row: RunningRow) -> object:
        prepared = row.prepared
        if prepared.target.read is not None:
            return "a reader", prepared.target.digest
        request = prepared.request
        use = prepared.generates, prepared.gate, prepared.target.mixture is not None, request.prompt_scores
        if not (self.host.decodes and not self.host.translates):
            return use
        # A prompt stands right in front of its text, so texts behind prompts are of one length.
        if prepared.generates and any(self._is_prompt(name) for lane in row.lanes for name in lane.refs):
            return (*use, "behind a prompt", len(prepared.ids))
        return (*use, max(6, len(prepared.ids).bit_length()))

    def _is_prompt(self, name: str) -> bool:
        adapter = self.host.runtime.adapters.get(name)
        return adapter is not None and adapter.prompt() is not None

    def _read(self, rows: Sequence[RunningRow], *, steady: bool) -> None:
        if rows[0].prepared.target.read is not None:
            self.readings.append(ReaderRows(rows, steady=steady))
        else:
            self.readings.append(Reading(self.host, rows, steady=steady))

    def turn(self) -> bool:
        """One step of one batch, or one chunk of one reading; whether there was any work."""
        work: list[Reading | ReaderRows | DecodingBatch] = [*sorted(self.readings, key=lambda r: r.left), *self.batches]
        if not work:
            return False
        one = self.turns.next(work)
        self.steps += 1
        began = perf_counter()
        if isinstance(one, Reading):
            before = one.left
            self._advance(one)
            self.pace.read(before - one.left, perf_counter() - began)
        elif isinstance(one, ReaderRows):  # passes of another kind say nothing of how long a chunk of a prompt takes
            self._advance(one)
        else:
            self._step(one)
            self.pace.stepped(perf_counter() - began)
        self.turns.charge(one, perf_counter() - began)
        return True

    def _advance(self, reading: Reading | ReaderRows) -> None:
        """Read on. Where that fails rows are read alone, so that an error belongs to the row that causes it."""
        try:
            if not reading.advance(STEADY if reading.steady else self.pace.chunk):
                return
        except (HubError, *BREAKDOWNS) as error:
            self.readings.remove(reading)
            if len(reading.rows) == 1:
                reading.rows[0].error = as_hub_error(error)
                return
            for row in (row for row in reading.rows if not row.over):
                self._read([row], steady=reading.steady)
            return
        self.readings.remove(reading)
        if reading.batch is not None:
            self._join(reading.batch)

    def _join(self, fresh: DecodingBatch) -> None:
        rows = len(fresh.rows)
        fresh.compact(every=True)
        there = next((b for b in self.batches if b.gate is fresh.gate and b.state.joins and fresh.state.joins), None)
        if fresh.rows and there is not None:
            try:
                there.join(fresh)
            except BREAKDOWNS as error:  # out of memory
                self._fail([*there.rows, *fresh.rows], as_hub_error(error))
            rows = max(rows, there.running)
        elif fresh.rows:
            self.batches.append(fresh)
        self._joined(rows)

    def _step(self, batch: DecodingBatch) -> None:
        try:
            batch.step()
        except (HubError, *BREAKDOWNS) as error:
            self._fail(batch.rows, as_hub_error(error))

    @staticmethod
    def _fail(rows: Sequence[RunningRow], error: HubError) -> None:
        for row in rows:
            if not row.over:
                row.error = error

    def ended(self) -> list[Job]:
        """Jobs that have ended since the last call; what they use may still be laid out."""
        ended = [job for job in self.running if job.row.over]
        self.running = [job for job in self.running if not job.row.over]
        self.left_over += ended
        return ended

    def sweep(self) -> list[Job]:
        """Leave out what has ended where that is worth it; the jobs that have left their batches."""
        self.readings = [r for r in self.readings if not all(row.over for row in r.rows)]
        for batch in self.batches:
            batch.compact()
        self.batches = [batch for batch in self.batches if batch.rows]
        there = {id(row) for one in self._all for row in one.rows}
        left = [job for job in self.left_over if id(job.row) not in there]
        self.left_over = [job for job in self.left_over if id(job.row) in there]
        return left

    @property
    def held(self) -> list[Job]:
        """Jobs whose adapters may not go."""
        return [*self.running, *self.left_over]

    def rows_of(self, gate: Routing | None) -> list[RunningRow]:
        """Rows of a gate that hold places: under way, or ended and not left out yet."""
        read = [row for r in self.readings if r.gate is gate for row in r.rows]
        return read + [row for b in self.batches if b.gate is gate for row in b.rows]

    @property
    def _all(self) -> list[Reading | ReaderRows | DecodingBatch]:
        return [*self.readings, *self.batches]

    @property
    def gates(self) -> list[Routing | None]:
        """Of all that is under way."""
        return list(dict.fromkeys(w.gate for w in self._all))

    @property
    def bytes(self) -> int:
        """Of the caches."""
        return sum(batch.state.bytes for batch in self.batches) + sum(r.bytes for r in self.readings)
