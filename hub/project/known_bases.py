"""Where base models lie on this machine: ``bases.json`` in HUB_HOME, fingerprint of the weights -> directory.

A manifest names a base by what its weights are and by the last name of its directory, never by a path. What was
measured once is found again here, so that an adapter made for a directory runs without being told where that is.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hub.errors import StoreError
from hub.project.json_map import JsonMap
from hub.store import default_root


class KnownBases:
    """The directories of base models that this machine has seen.

    Parameters
    ----------
    home
        Where the table is kept; HUB_HOME where it is None.
    """

    def __init__(self, home: Path | None = None) -> None:
        path = (home or default_root()) / "bases.json"
        self._table = JsonMap(path, holds="fingerprints to directories", mend=f"remove it: rm {path}")

    def remember(self, fingerprint: str, directory: Path) -> None:
        """Note where the base of a weights fingerprint lies; a home that cannot be written notes nothing."""
        place = str(directory.resolve())
        with suppress(OSError, StoreError):
            if self._table.read().get(fingerprint) != place:
                with self._table.changing() as table:
                    table[fingerprint] = place

    def directory(self, fingerprint: str) -> Path | None:
        """Directory of that base, as far as it is still there; whether it still holds that base, its reader checks.

        Raises
        ------
        StoreError
            The table is damaged.
        """
        place = self._table.read().get(fingerprint)
        return Path(place) if place is not None and (Path(place) / "config.json").is_file() else None
