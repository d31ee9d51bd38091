"""Compositions that were active last, as their slots held them: going back to one lowers nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from compose.kind.adapter import Adapter
from compose.slots.slot import Slot

_ROOM = 8  # compositions; each keeps alive what was laid out for it, at most as much again as its adapters


def stamps(adapters: Sequence[Adapter]) -> Hashable | None:
    """What tells whether the tensors of these adapters are as they were; None where that cannot be told.

    Tensors made in ``torch.inference_mode`` count no changes. What is written through ``.data`` is not counted either:
    whoever does that to a frozen adapter says so with ``adapter.changed()``.
    """
    tensors = [[*a.parameters(), *a.buffers()] for a in adapters]
    if any(t.is_inference() for some in tensors for t in some):
        return None
    return tuple(
        (id(a), a.revision, tuple((t.data_ptr(), t._version) for t in some))
        for a, some in zip(adapters, tensors, strict=True)
    )


class RecentPrograms:
    """What slots hold, by a key that stands for everything it was made of, and the names of the adapters in it."""

    def __init__(self) -> None:
        self._snapshots: OrderedDict[Hashable, tuple[frozenset[str], list[tuple[Slot, dict[str, Any]]]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_snapshots": OrderedDict()}  # a copy of a model lowers its own adapters

    def restore(self, key: Hashable | None) -> bool:
        """Put back what slots held under ``key``; False if nothing is known of it. The slots must be clear."""
        if key not in self._snapshots:
            return False
        self._snapshots.move_to_end(key)
        for slot, snapshot in self._snapshots[key][1]:
            slot.__dict__.update(snapshot)
        return True

    def keep(self, key: Hashable | None, names: Iterable[str], slots: Iterable[Slot]) -> None:
        """Remember what ``slots`` hold; with the key None nothing."""
        if key is None:
            return
        self._snapshots[key] = frozenset(names), [(s, snapshot) for s in slots if (snapshot := s.snapshot())]
        if len(self._snapshots) > _ROOM:
            self._snapshots.popitem(last=False)

    def drop(self, name: str) -> None:
        """Forget every composition that the adapter ``name`` is in."""
        for key in [key for key, (names, _) in self._snapshots.items() if name in names]:
            del self._snapshots[key]
