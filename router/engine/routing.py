"""Rows that a router chooses for: weighed together, then each is a row like any other; or weighed at each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compose.expr.tree import IDENTITY, Ref
from hub.store import Artifact, Store
from router.artifact import load
from router.bench import Batch, tree
from router.engine.host import Host
from router.engine.sources import KnownAdapter
from router.router import Router

_NO_ROWS: Any = None  # a router of tokens looks at none beforehand


@dataclass(frozen=True, eq=False)
class Routing:
    """A router over residents.

    Attributes
    ----------
    router
        Its experts are the names of residents, or the bare base.
    members
        Name of a resident -> what it is; two experts may be one resident.
    """

    router: Router
    members: Mapping[str, KnownAdapter]

    @property
    def by_token(self) -> bool:
        """Whether it weighs the experts anew at each site for each token; such rows are computed by themselves."""
        return self.router.level == "site"

    @property
    def asks_members(self) -> bool:
        """Whether the members have to be resident before it can choose: it knows nothing of them by itself."""
        return self.by_token or not all(self.router.statistics.get(name) for name in self.router.experts)

    def activate(self, host: Host) -> None:
        """Make it weigh its experts at each token."""
        host.activate_by(self, lambda model: self.router.activate(model, _NO_ROWS))

    def weigh(self, host: Host, rows: Sequence[Sequence[int]], tasks: Sequence[str | None]) -> list[dict[str, float]]:
        """Weights of the residents, and of the base by its name, for each row of token ids; zeros are left out.

        The rows are one batch; `tasks` are what they ask for, where the router reads that.
        """
        named = [task for task in tasks if task is not None]
        batch = Batch.of([torch.tensor(ids) for ids in rows], pad=host.pad, tasks=named).to(host.model.device)
        weights = self.router.weights(host.model, batch).tolist()
        host.forget()
        names = [next(iter(tree(expert).refs), host.name) for expert in self.router.experts.values()]
        return [_sums(names, row) for row in weights]


def routing(artifact: Artifact, store: Store, known: Mapping[str, KnownAdapter]) -> Routing:
    """A stored router, its members known by their refs."""
    stored = load(artifact.ref.at(digest=artifact.digest, version=None), store)
    members = {name: known[str(member.ref)] for name, member in stored.artifacts.items()}
    experts = {n: Ref(members[n].name) if n in members else IDENTITY for n in stored.router.experts}
    return Routing(replace(stored.router, experts=experts), {member.name: member for member in members.values()})


def _sums(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The weight of each name that has any: experts of one name are one adapter, and their weights add up."""
    totals: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        if weight != 0:
            totals[name] = totals.get(name, 0.0) + weight
    return totals
