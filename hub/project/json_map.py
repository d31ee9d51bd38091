"""A small table of texts kept as a JSON file in HUB_HOME, changed under a lock so that two of us lose nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hub.errors import HubError, StoreError
from hub.io import canonical_json as canonical
from hub.io.disk import disk_errors
from hub.io.files import atomic_write, group_mode, make_directory, read_capped

_MAX = 2**24  # bytes


class JsonMap:
    """Text -> text.

    Parameters
    ----------
    path
        The file; made by the first change.
    holds
        What it maps, for errors: ``names to URLs``.
    mend
        What to do when the file is damaged.
    """

    def __init__(self, path: Path, *, holds: str, mend: str) -> None:
        self.path, self._holds, self._mend = path, holds, mend

    def read(self) -> dict[str, str]:
        """All entries, sorted by key. Raises StoreError where the file is not what this class writes."""
        if not self.path.exists():
            return {}
        try:
            table = canonical.loads(read_capped(self.path, _MAX), what=str(self.path))
            if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
                raise StoreError(f"{self.path} does not map {self._holds}", path=self.path)
        except HubError as error:
            raise StoreError(error.message, path=self.path, hint=self._mend) from error
        return dict(sorted(table.items()))

    @contextmanager
    def changing(self) -> Iterator[dict[str, str]]:
        """Entries to change; they are written when the block ends well."""
        from filelock import FileLock

        with disk_errors(self.path.parent):
            make_directory(self.path.parent)
            mode = group_mode(self.path.parent, 0o644)
            with FileLock(self.path.with_name(f".{self.path.stem}.lock"), timeout=30, mode=mode):
                table = self.read()
                yield table
                atomic_write(self.path, json.dumps(table, indent=2, sort_keys=True).encode() + b"\n")
