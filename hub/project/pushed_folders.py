"""Which artifact a folder was pushed as: ``folders.json`` in HUB_HOME, folder -> name.

A folder that PEFT or a Trainer wrote stays as it is, so what its author said at the first push (name, licence, ...)
is not in it. The next push of the same folder finds it again in what was published from it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hub.errors import HubError, StoreError
from hub.project.json_map import JsonMap
from hub.ref import AdapterRef
from hub.store import Store

_SAID = ("name", "base", "method", "task", "labels", "languages", "domains", "license", "summary")


class PushedFolders:
    """The folders without a ``module.json`` that were pushed into a store.

    Parameters
    ----------
    store
        What they were pushed into; the table lies beside it.
    """

    def __init__(self, store: Store) -> None:
        path = store.root / "folders.json"
        self._store = store
        self._table = JsonMap(path, holds="folders to names", mend=f"remove it: rm {path}")

    def remember(self, directory: Path, ref: AdapterRef) -> None:
        """Note what was published from a folder; a home that cannot be written notes nothing."""
        place = str(directory.resolve())
        with suppress(OSError, StoreError):
            if self._table.read().get(place) != ref.id:
                with self._table.changing() as table:
                    table[place] = ref.id

    def facts(self, directory: Path) -> dict[str, object]:
        """What the author said of a folder: facts of the newest version of what it was pushed as, while that is here.

        Raises
        ------
        StoreError
            The table is damaged.
        """
        ref = self._table.read().get(str(directory.resolve()))
        try:
            manifest = None if ref is None else self._store.get(ref).manifest
        except HubError:
            return {}
        said = {name: getattr(manifest, name, None) for name in _SAID}
        return {name: value for name, value in said.items() if value not in (None, (), "")}
