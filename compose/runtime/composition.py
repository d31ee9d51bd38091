"""A composition made ready for one model: what each slot computes, the prefixes and the prompts.

It is made aside and never changes. Making it active is one assignment, so no interruption leaves half of it, and a
forward under way keeps the one it began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compose.expr.tree import IDENTITY, Expr
from compose.kernels.coefficients import Coefficient
from compose.kind.adapter import Adapter
from compose.kind.tensors import Watched
from compose.runtime.prefixes import PrefixState
from compose.runtime.prompts import PromptState
from compose.slots.gate import Routing
from compose.slots.slot import Program


class Origin:
    """What a composition was made of, and whether that is as it was.

    Told by the adapters' revisions and the version counters of their tensors, which every operation in place moves, and
    by how often ``.data`` was asked for, which no counter follows (see :class:`compose.kind.tensors.Watched`).
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        members: Mapping[str, Adapter],
        other: Sequence[Tensor] = (),
    ) -> None:
        """Of resident ``adapters``, ``members`` of merges that need not be resident any more, and ``other`` tensors."""
        self.adapters, self.members = dict(adapters), dict(members)
        every = [*self.adapters.values(), *self.members.values()]
        self._revisions = [(a, a.revision) for a in every]
        tensors = [t for a in every for t in (*a.parameters(), *a.buffers())] + list(other)
        self._tensors = [t for t in tensors if not t.is_inference()]  # those count no changes
        self._versions = [t._version for t in self._tensors]
        self._asked, self._each = Watched.asked, self._of_each()

    def _of_each(self) -> list[int]:
        return [t.times_asked for t in self._tensors if isinstance(t, Watched)]

    def outdated(self) -> Origin:
        """The same, as of another time."""
        other = Origin(self.adapters, self.members)
        other._tensors, other._versions = [], [0]
        return other

    def changed(self, resident: Mapping[str, Adapter], *, values: bool = True) -> bool:
        """Whether an adapter has other values since, or another one has its name; without ``values`` only the last."""
        if any(a.revision != revision for a, revision in self._revisions):
            return True
        others = any(resident.get(name) is not a for name, a in self.adapters.items())
        if others or any(resident.get(name, a) is not a for name, a in self.members.items()):
            return True
        if not values:
            return False
        if [t._version for t in self._tensors] != self._versions:
            return True
        if Watched.asked != self._asked:
            if self._of_each() != self._each:
                return True
            self._asked = Watched.asked
        return False


@dataclass(frozen=True, eq=False)
class Composition:
    """Rows (one: for all rows of any batch) with weights by name, or experts with a gate, and what was made of them."""

    rows: tuple[Expr, ...] = (IDENTITY,)
    weights: Mapping[str, Coefficient] = field(default_factory=dict)
    routing: Routing | None = None
    programs: Mapping[str, Program] = field(default_factory=dict)  # by the path of the slot
    prefixes: Mapping[str, PrefixState] = field(default_factory=dict)  # by the path of the attention module
    shift: Tensor | None = None  # how far prefixes move each row's text, (R, 1)
    prompt: PromptState | None = None
    count: int = 1  # rows told apart
    tokens: int = 0  # length of the weights per token, 0 without
    vocabulary: tuple[str, int] | None = None  # an adapter with one of its own, and its tokens
    measures_past: bool = False  # the length of the cache is asked for
    trains: bool = False  # made anew in each call
    only_sides_learn: bool = False  # no gradient is asked for inside the backbone
    origin: Origin = field(default_factory=lambda: Origin({}, {}))
    device: torch.device | None = None  # where it was made
