"""Rows that a router chooses for: weighed together, then each is a row like any other; or weighed at each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from compose.expr.tree import Ref
from hub.store import Artifact, Store
from router.artifact import Stored, load
from router.bench import Batch
from router.dispatch import row_expressions
from router.engine.host import Host
from router.engine.prepare import Prepared, prepare
from router.engine.sources import Known
from router.engine.targets import Target
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

    def weigh(self, host: Host, rows: Sequence[Prepared]) -> list[dict[str, float]]:
        """Weights of the members for each row, zeros left out; one batch."""
        ids = [torch.tensor(row.ids) for row in rows]
        batch = Batch.of(ids, pad=host.pad).to(host.model.device)
        weights = self.router.weights(host.model, batch).tolist()
        host.forget()
        return [{n: w for n, w in zip(self.members, row, strict=True) if w != 0} for row in weights]

    def choose(self, host: Host, row: Prepared, weights: dict[str, float]) -> Prepared:
        """The row with its members chosen: it answers as the one with the largest weight does."""
        first = self.members[max(weights, key=weights.__getitem__)]
        (expr,) = row_expressions([Ref(name) for name in weights], torch.tensor([list(weights.values())]).double())
        assert expr is not None  # noqa: S101 - some weight is not zero
        front = sum(self.members[name].front for name in weights)
        target = Target(row.target.text, expr, tuple(weights), first.labels, first.task, first.max_length, front)
        return replace(prepare(host, row.request, target), weights=weights)


def routing(artifact: Artifact, store: Store, known: Mapping[str, Known]) -> Routing:
    """A stored router, its members known by their refs."""
    stored: Stored = load(artifact.ref.at(digest=artifact.digest, version=None), store)
    names = {name: known[str(found.ref)] for name, found in stored.artifacts.items()}
    experts = {name: Ref(member.name) for name, member in names.items()}
    return Routing(replace(stored.router, experts=experts), {member.name: member for member in names.values()})
