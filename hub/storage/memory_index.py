"""An index in memory, for a store that this process may only read; it goes with the process, however that ends."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import finalize

from hub.storage.index import Index


class MemoryIndex(Index):
    """One connection, which threads use in turn: the database is gone with it."""

    def __init__(self) -> None:
        super().__init__(Path(":memory:"))
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._turn = threading.Lock()
        finalize(self, self._db.close)

    @property
    def exists(self) -> bool:
        """Always: an empty one is of no schema, and so without a position."""
        return True

    @contextmanager
    def connect(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """The connection, in one transaction where it writes."""
        with self._turn:
            try:
                if write:
                    self._db.execute("BEGIN")
                yield self._db
                if write:
                    self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
