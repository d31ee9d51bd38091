"""Which of the requests that wait begin now: those whose adapters are in memory, and who fit beside what is under way.

A row's places (prompt, virtual tokens, and all that it may write) are set aside when it begins, so that the caches
never hold more than the bound: over all batches, rows times the places of the longest stay within `tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from time import monotonic

from hub.errors import HubError
from router.engine.batches.running_row import RunningRow
from router.engine.chooser import Chooser, asks
from router.engine.host import Host
from router.engine.job import BREAKDOWNS, Job, TooLarge, as_hub_error
from router.engine.prepare import PreparedRow
from router.engine.residency import Residency
from router.engine.sources import KnownAdapter, Sources
from router.engine.work import Work

_SCAN = 64  # requests that are looked at in a turn
_PATIENCE = 32  # others that may begin before one that did not fit when its turn came
_READ_TURNS = 1000  # turns after which a row whose adapters do not come in is waited for


class Admission:
    """Lets rows begin.

    Attributes
    ----------
    rows, tokens
        Bounds: rows of a batch, and places of all caches; see `Engine`.
    """

    def __init__(
        self, host: Host, sources: Sources, residency: Residency, work: Work, *, rows: int, tokens: int
    ) -> None:
        self.rows, self.tokens = rows, tokens
        self.chooser = Chooser(host, residency, rows=rows, tokens=tokens)
        self._sources, self._residency, self._work = sources, residency, work

    def needed(self, rows: Sequence[PreparedRow]) -> list[KnownAdapter]:
        """Adapters that rows use, each once."""
        return [self._sources.named(name) for name in dict.fromkeys(n for row in rows for n in row.target.names)]

    def prefetch(self, rows: Sequence[PreparedRow]) -> None:
        """Begin to read what rows use. From any thread."""
        self._residency.prefetch(self.needed(rows))

    @property
    def places(self) -> int:
        """Places of the caches that are set aside for what is under way: rows times the longest, of each gate."""
        total = 0
        for gate in self._work.gates:
            rows = self._work.rows_of(gate)
            total += sum(len(one.lanes) for one in rows) * max((one.prepared.places for one in rows), default=0)
        return total

    def refuse_too_large(self, row: PreparedRow) -> None:
        """Raise TooLarge for a row that can never fit, however long it waited."""
        places = row.lanes * row.places
        if places > self.tokens:
            times = f"{row.lanes} experts x " if row.lanes > 1 else ""
            raise TooLarge(
                f"{times}{row.places} tokens (read, virtual and new) are more than the {self.tokens} that this engine "
                "holds at once",
                hint="shorten the text or lower max_new_tokens, or Engine(tokens=...)",
            )

    def admit(self, waiting: Sequence[Job]) -> list[tuple[Job, HubError | None]]:
        """Begin what can begin; those jobs that need not wait any more, with what went wrong."""
        looked_at = waiting[: max(_SCAN, self.rows)]
        gone: list[tuple[Job, HubError | None]] = list(self._route(looked_at))
        failed = {id(job) for job, _ in gone}
        taken: list[Job] = []
        passed: list[Job] = []
        for job in looked_at:
            if id(job) in failed or job.row.cancelled:
                continue
            if not self._is_ready(job, taken):
                continue
            if not self._fits(taken, job.row):
                if job.passed >= _PATIENCE:
                    break  # nobody overtakes it any more, or it might wait for ever
                passed.append(job)
                continue
            try:
                self._acquire(job)
            except (HubError, *BREAKDOWNS) as error:
                gone.append((job, as_hub_error(error)))
                continue
            for other in passed:
                other.passed += 1
            taken.append(job)
        if taken:
            self._work.begin(taken)
            self.prefetch(taken[-1].following)
        return [*gone, *((job, None) for job in taken)]

    def _acquire(self, job: Job) -> None:
        self.refuse_too_large(job.row.prepared)
        self._residency.acquire(self.needed([job.row.prepared]))
        job.acquired, job.began = True, monotonic()

    def release(self, job: Job) -> None:
        """Let go of what a row used; it must have left its batch."""
        if job.acquired:
            self._residency.release(self.needed([job.row.prepared]))
            job.acquired = False

    def _route(self, jobs: Sequence[Job]) -> list[tuple[Job, HubError | None]]:
        """Let routers choose for the first rows that are open; the errors."""
        open_ones = [job for job in jobs if asks(job.row.prepared) and not job.row.cancelled][: self.rows]
        if self._work.running:  # who writes waits for one prompt that is chosen for, or for a few short ones
            read = accumulate(len(job.row.prepared.ids) for job in open_ones)
            open_ones = open_ones[: max(1, sum(tokens <= self._work.pace.chunk for tokens in read))]
        errors: list[tuple[Job, HubError | None]] = []
        routed = self.chooser.route([job.row.prepared for job in open_ones])
        for job, row in zip(open_ones, routed, strict=True):
            if isinstance(row, HubError):
                errors.append((job, row))
            else:
                job.row.choose(row)
                self.prefetch([row])
        return errors

    def _is_ready(self, job: Job, taken: Sequence[Job]) -> bool:
        """Whether its adapters are there. Waiting for a disk would hold up the others, so they are passed over."""
        needed = self.needed([job.row.prepared])
        if self._residency.ready(needed):
            return True
        idle = not (taken or self._work.running)
        together = job.together is not None and all(j.together is job.together for j in (*taken, *self._work.running))
        if together and not any(j.row.written for j in self._work.running):
            return True  # a file's batch begins as a whole
        job.unready += 1
        self._residency.prefetch(needed, due=True)
        return job.unready > _READ_TURNS or (idle and not self._residency.reading(needed))

    def _fits(self, taken: Sequence[Job], row: RunningRow) -> bool:
        if not taken and not self._work.running:
            return True
        return self._has_places(taken, row) and self._residency.fits(
            self.needed([job.row.prepared for job in (*taken, *self._work.held)] + [row.prepared])
        )

    def _has_places(self, taken: Sequence[Job], row: RunningRow) -> bool:
        mine, total = row.prepared.gate, 0
        for gate in dict.fromkeys([*self._work.gates, *(j.row.prepared.gate for j in taken), mine]):
            rows = [*self._work.rows_of(gate), *(j.row for j in taken if j.row.prepared.gate is gate)]
            if gate is mine:
                rows = [*rows, row]
            lanes = sum(len(one.lanes) for one in rows)
            if gate is mine and len(rows) > 1 and lanes > self.rows:
                return False
            total += lanes * max((one.prepared.places for one in rows), default=0)
        return total <= self.tokens
