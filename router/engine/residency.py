"""Thousands of adapters on disk, as many in memory as a budget of bytes holds: least recently used goes first.

Reading runs in a thread of its own while the base computes; only putting a finished adapter on the base, which is a
copy, waits for the base to be at rest.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from compose.kind.adapter import Adapter
from router.engine.host import Host
from router.engine.sources import KnownAdapter, size_of

_AHEAD = 64  # adapters that are read before they are waited for, and as many bytes as may be resident


@dataclass
class ResidencyCounts:
    """What residency has done since it began."""

    hits: int = 0  # asked for and there
    read: int = 0  # read from disk
    ahead: int = 0  # of those, read before they were waited for
    evicted: int = 0


class Residency:
    """Adapters on one base.

    Parameters
    ----------
    budget
        Bytes of adapter tensors kept; what is in use at one time is kept beyond it if it has to be. None: no bound.
    """

    def __init__(self, host: Host, *, budget: int | None = None) -> None:
        self._host, self.budget = host, budget
        self._bytes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._uses: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        self._coming: dict[str, tuple[int, Future[Adapter]]] = {}  # bytes, and the reading; oldest first
        self._lock = Lock()  # of what is coming: any thread may ask for it
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="moduloom-reader")
        self.counts = ResidencyCounts()
        self.on_read: Callable[[], None] = lambda: None  # called, in the reading thread, when one has been read
        self.on_gone: list[Callable[[str], None]] = []  # are told the name of each that is resident no more

    @property
    def bytes(self) -> int:
        """Bytes of the resident adapters."""
        return sum(self._bytes.values())

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the resident adapters, least recently used first."""
        return tuple(self._bytes)

    def fits(self, found: Iterable[KnownAdapter]) -> bool:
        """Whether these can be resident at one time within the budget."""
        return self.budget is None or sum(known.bytes for known in found) <= self.budget

    def prefetch(self, wanted: Iterable[KnownAdapter], *, due: bool = False) -> None:
        """Begin to read those that are not here. From any thread; errors come with :meth:`acquire`.

        Where too many are read ahead nothing happens, unless they are ``due``: the newest then makes room.
        """
        for known in wanted:
            with self._lock:
                if known.name in self._bytes or known.name in self._coming:
                    continue
                # A reading under way cannot be taken back, so only one that has ended makes room.
                last = next((name for name in reversed(self._coming) if self._is_read(name)), None)
                if due and last is not None and self._is_full(known.bytes):
                    del self._coming[last]
                if not self._is_full(known.bytes):
                    reading = self._reader.submit(known.read, self._host)
                    reading.add_done_callback(lambda _: self.on_read())
                    self._coming[known.name] = known.bytes, reading

    def ready(self, wanted: Iterable[KnownAdapter]) -> bool:
        """Whether :meth:`acquire` would not wait for a disk."""
        there = self._host.runtime.adapters
        with self._lock:
            return all(known.name in there or self._is_read(known.name) for known in wanted)

    def reading(self, wanted: Iterable[KnownAdapter]) -> bool:
        """Whether some of these are being read just now."""
        with self._lock:
            return any(known.name in self._coming and not self._is_read(known.name) for known in wanted)

    def _is_read(self, name: str) -> bool:
        return name in self._coming and self._coming[name][1].done()

    def _is_full(self, more: int) -> bool:
        """Whether so many more bytes are too many to be read ahead; one adapter always may."""
        ahead = sum(size for size, _ in self._coming.values())
        too_large = self.budget is not None and ahead + more > self.budget
        return bool(self._coming) and (len(self._coming) >= _AHEAD or too_large)

    def acquire(self, wanted: Collection[KnownAdapter]) -> None:
        """Make these resident and keep them so until :meth:`release`. The base must be at rest.

        Raises
        ------
        HubError
            One that cannot be read; nothing is held then.
        """
        self.prefetch(wanted)
        self._uses.update(known.name for known in wanted)
        try:
            for known in wanted:
                self._put(known)
        except BaseException:
            self.release(wanted)
            raise
        self._evict()

    def release(self, used: Collection[KnownAdapter]) -> None:
        """Let go of what :meth:`acquire` held."""
        self._uses.subtract(known.name for known in used)
        self._uses += Counter()  # without the zeros
        for name in [name for name in self._unwanted if not self._uses[name]]:
            self.drop(name)

    @contextmanager
    def in_use(self, wanted: Collection[KnownAdapter]) -> Iterator[None]:
        """Keep these resident for a while."""
        self.acquire(wanted)
        try:
            yield
        finally:
            self.release(wanted)

    def drop(self, name: str) -> None:
        """Let one go: now, or once it is no longer in use."""
        with self._lock:
            self._coming.pop(name, None)
        if self._uses[name]:
            self._unwanted.add(name)
            return
        self._unwanted.discard(name)
        if name in self._bytes:
            self._remove(name)

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _put(self, known: KnownAdapter) -> None:
        with self._lock:
            _, coming = self._coming.pop(known.name, (0, None))
        if known.name in self._host.runtime.adapters:
            self.counts.hits += 1
        else:
            self.counts.ahead += coming is not None and coming.done()
            adapter = known.read(self._host) if coming is None else coming.result()
            self._evict(known.bytes)
            self._host.runtime.add(known.name, adapter)
            self._bytes[known.name] = size_of(adapter)
            self.counts.read += 1
        if known.name in self._bytes:
            self._bytes.move_to_end(known.name)

    def _evict(self, coming: int = 0) -> None:
        """Remove the least recently used that nobody uses until the rest is within the budget."""
        if self.budget is None:
            return
        self._adopt_merged()
        while self.bytes + coming > self.budget:
            idle = next((name for name in self._bytes if not self._uses[name]), None)
            if idle is None:
                return
            self._remove(idle)
            self.counts.evicted += 1

    def _adopt_merged(self) -> None:
        """Count adapters that an expression such as ties(a, b) has made on the base."""
        for name, adapter in self._host.runtime.adapters.items():
            if name not in self._bytes and "(" in name:
                self._bytes[name] = size_of(adapter)
                self._bytes.move_to_end(name, last=False)

    def _remove(self, name: str) -> None:
        if any(name in row.refs for row in self._host.runtime.rows):
            self._host.rest()
        self._host.runtime.remove(name)
        del self._bytes[name]
        for tell in self.on_gone:
            tell(name)
