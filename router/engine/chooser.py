"""Let routers choose for rows that name one: each is then a row like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hub.errors import HubError
from router.engine.host import Host
from router.engine.job import BREAKDOWNS, as_hub_error
from router.engine.prepare import PreparedRow, with_members
from router.engine.residency import Residency
from router.engine.routing import Routing
from router.engine.schedule import batches


class Chooser:
    """Asks routers, in batches of at most so many rows and tokens. The base must be at rest while it does."""

    def __init__(self, host: Host, residency: Residency, *, rows: int, tokens: int) -> None:
        self._host, self._residency, self._rows, self._tokens = host, residency, rows, tokens

    def route(self, rows: Sequence[PreparedRow]) -> list[PreparedRow | HubError]:
        """The rows with what their routers chose; those without one come back as they are."""
        routed: list[PreparedRow | HubError] = list(rows)
        waiting = [i for i, row in enumerate(rows) if asks(row)]
        cut = batches([rows[i] for i in waiting], most=self._rows, tokens=self._tokens, fits=lambda _names: True)
        for batch in cut:
            groups: dict[Routing, list[int]] = {}
            for i in (waiting[k] for k in batch):
                routing = rows[i].target.routing
                assert routing is not None  # noqa: S101 - they are those with one
                groups.setdefault(routing, []).append(i)
            for routing, members in groups.items():
                for i, row in zip(members, self._choose(routing, [rows[i] for i in members]), strict=True):
                    routed[i] = row
        return routed

    def _choose(self, routing: Routing, rows: list[PreparedRow]) -> list[PreparedRow | HubError]:
        try:
            with self._residency.in_use(list(routing.members.values()) if routing.asks_members else []):
                weights = routing.weigh(self._host, [row.ids for row in rows], [row.request.task for row in rows])
            if routing.by_token:
                return [replace(row, weights=w) for row, w in zip(rows, weights, strict=True)]
            return [with_members(self._host, row, w) for row, w in zip(rows, weights, strict=True)]
        except (HubError, *BREAKDOWNS) as error:
            if len(rows) == 1:
                return [as_hub_error(error)]
            return [one for row in rows for one in self._choose(routing, [row])]


def asks(row: PreparedRow) -> bool:
    """Whether a router is to be asked before the row is computed."""
    return row.open or (row.target.routing is not None and row.request.weights and not row.weights)
