"""Several blobs at once: a few threads that take jobs from one list, and stop together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar, cast

JOBS = 8  # blobs that move at once, where nobody says otherwise
MOST_JOBS = 64
_GRACE = 2.0  # seconds that a thread has to notice that all stop; one that waits for a dead network is left behind

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Stopped(Exception):
    """Another job has failed, or the user has had enough: this one ends, and says nothing."""


class Workers:
    """Threads that stop together: at the first error, or when the caller is interrupted.

    Parameters
    ----------
    size
        Threads at most. With one, the jobs run in the caller's own thread, one after the other.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self._stop = threading.Event()

    def map(self, work: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
        """Results of all jobs, in the order of the items.

        Raises
        ------
        BaseException
            The first error of any job. The others have ended by then, or end at the next bytes that they touch.
        """
        if min(self.size, len(items)) < 2:
            return [work(item) for item in items]
        # Each thread takes the next item until none is left; how it ended, it puts into `ended`.
        results: list[ResultT | None] = [None] * len(items)
        todo, turn = iter(range(len(items))), threading.Lock()
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def run() -> None:
            try:
                while not self._stop.is_set():
                    with turn:
                        place = next(todo, None)
                    if place is None:
                        break
                    results[place] = work(items[place])
            except Stopped:
                ended.put(None)
            except BaseException as error:  # noqa: BLE001  (the caller raises it)
                ended.put(error)
            else:
                ended.put(None)

        # Daemons: an interrupted command ends without waiting for a server that answers no more.
        threads = [threading.Thread(target=run, daemon=True) for _ in range(min(self.size, len(items)))]
        for thread in threads:
            thread.start()
        # The first error, or an interrupt of the caller while it waits, stops all the others.
        try:
            for _ in threads:
                if (error := ended.get()) is not None:
                    raise error
        except BaseException:
            self._stop.set()
            until = time.monotonic() + _GRACE
            for thread in threads:
                thread.join(max(until - time.monotonic(), 0))
            raise
        return cast("list[ResultT]", results)

    def chunks(self, source: Iterable[bytes]) -> Iterator[bytes]:
        """Chunks of a source for as long as nothing has stopped; then `Stopped`, before the next one is used."""
        for chunk in source:
            self._check()
            yield chunk

    def watched(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Give a function that counts bytes, and raises `Stopped` where the work is called off."""

        def tell(count: int) -> None:
            self._check()
            advance(count)

        return tell

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped
