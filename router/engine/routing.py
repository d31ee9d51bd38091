"""Rows that a router chooses for: weighed together, then each is a row like any other; or weighed at each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from compose.expr.tree import Ref
from hub.store import Artifact, Store
from router.artifact import load
from router.bench import Batch
from router.engine.host import Host
from router.engine.sources import Known
from router.router import Router


@dataclass(frozen=True, eq=False)
class Routing:
    """A router over residents.

    Attributes
    ----------
    router
        Its experts are the names of residents.
    members
        Name of a resident -> what it is, in the router's order.
    """

    router: Router
    members: Mapping[str, Known]

    @property
    def by_token(self) -> bool:
        """Whether it weighs the experts anew at each site for each token; such rows are computed by themselves."""
        return self.router.level == "site"

    @property
    def asks_members(self) -> bool:
        """Whether the members have to be resident before it can choose: it knows nothing of them by itself."""
        return self.by_token or not all(self.router.statistics.get(name) for name in self.router.experts)

    def weigh(self, host: Host, rows: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """Weights of the members for each row of token ids, zeros left out; one batch."""
        batch = Batch.of([torch.tensor(ids) for ids in rows], pad=host.pad).to(host.model.device)
        weights = self.router.weights(host.model, batch).tolist()
        host.forget()
        return [{n: w for n, w in zip(self.members, row, strict=True) if w != 0} for row in weights]


def routing(artifact: Artifact, store: Store, known: Mapping[str, Known]) -> Routing:
    """A stored router, its members known by their refs."""
    stored = load(artifact.ref.at(digest=artifact.digest, version=None), store)
    names = {name: known[str(member.ref)] for name, member in stored.artifacts.items()}
    experts = {name: Ref(member.name) for name, member in names.items()}
    return Routing(replace(stored.router, experts=experts), {member.name: member for member in names.values()})
