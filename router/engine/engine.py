"""The engine: rows of any mixture of adapters over one base.

>>> engine = Engine("builtin:tiny-lm")
>>> engine.run([Request(text="To whom it may", adapter="legal"), Request(text="def main", adapter="0.5 * code + py")])
[Result(text=...), Result(text=...)]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compose.planning.members import AdapterSource
from hub.errors import HubError
from hub.store import Store
from router.engine.host import Host
from router.engine.prepare import PreparedRow, prepare, with_members
from router.engine.request import Request, Result
from router.engine.residency import Residency
from router.engine.routing import Routing
from router.engine.running_batch import RunningBatch, RunningRow
from router.engine.schedule import batches
from router.engine.sources import KnownAdapter, Sources
from router.engine.targets import Targets

Answer = Result | HubError
# What a library may raise over one batch (out of memory among them): it belongs to some row, and not to the others.
BREAKDOWNS = (RuntimeError, ValueError, TypeError, LookupError, OSError)


class Engine:
    """Many adapters over one base, computed together.

    Parameters
    ----------
    base, quantize, dtype, device, tokenizer
        See `compose.load`; a model in memory needs its tokenizer given.
    store
        Where refs are looked up (default: the user's own).
    adapters
        Adapters by names of their own: in memory, artifacts, directories or refs.
    resident
        Bytes of adapters kept in memory; None keeps all that were used.
    rows, tokens
        Bounds of a batch: its rows, and its rows times its longest text.
    allow_base_drift
        Accept adapters trained on other weights of the same architecture.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel,
        *,
        store: Store | None = None,
        adapters: Mapping[str, AdapterSource] | None = None,
        quantize: str = "none",
        dtype: Any = None,
        device: Any = None,
        tokenizer: Any = None,
        resident: int | None = None,
        rows: int = 32,
        tokens: int = 16_384,
        allow_base_drift: bool = False,
    ) -> None:
        self.host = Host(base, quantize=quantize, dtype=dtype, device=device, tokenizer=tokenizer)
        self.sources = Sources(self.host, store or Store(), adapters)
        self.targets = Targets(self.host, self.sources, allow_base_drift=allow_base_drift)
        self.residency = Residency(self.host, budget=resident)
        self.rows, self.tokens = rows, tokens

    def prepare(self, request: Request) -> PreparedRow:
        """Look up what a row names and encode it. Raises HubError for this row alone; from any thread."""
        return prepare(self.host, request, self.targets.get(request.adapter))

    def run(
        self, requests: Sequence[Request], *, done: Callable[[int, Answer], None] | None = None, strict: bool = True
    ) -> list[Answer]:
        """Compute rows in batches of like length; results are in the order of the requests.

        Parameters
        ----------
        done
            Called with the index and the answer of each row as soon as it is there.
        strict
            Raise the first error; else it stands in the place of that row's result.
        """
        answers: dict[int, Answer] = {}

        def tell(index: int, answer: Answer) -> None:
            if strict and isinstance(answer, HubError):
                raise answer
            answers[index] = answer
            if done is not None:
                done(index, answer)

        ready: dict[int, PreparedRow] = {}
        for index, request in enumerate(requests):
            try:
                ready[index] = self.prepare(request)
            except HubError as error:
                tell(index, error)
        order = list(ready)
        rows: list[PreparedRow] = []
        for index, routed in zip(ready, self.route(list(ready.values())), strict=True):
            if isinstance(routed, HubError):
                tell(index, routed)
                order.remove(index)
            else:
                rows.append(routed)
        cut = self.batches(rows)
        for number, batch in enumerate(cut):
            following = [rows[i] for i in cut[number + 1]] if number + 1 < len(cut) else []
            for i, answer in zip(batch, self.compute([rows[i] for i in batch], following), strict=True):
                tell(order[i], answer)
        return [answers[index] for index in range(len(requests))]

    def route(self, rows: Sequence[PreparedRow]) -> list[PreparedRow | HubError]:
        """Let routers choose for the rows that are open; the others come back as they are. The base must be at rest."""
        routed: list[PreparedRow | HubError] = list(rows)
        waiting = [
            i for i, row in enumerate(rows) if row.open or (row.target.routing is not None and row.request.weights)
        ]
        for batch in self.batches([rows[i] for i in waiting]):
            groups: dict[Routing, list[int]] = {}
            for i in (waiting[k] for k in batch):
                routing = rows[i].target.routing
                assert routing is not None  # noqa: S101 - they are those with one
                groups.setdefault(routing, []).append(i)
            for routing, members in groups.items():
                for i, row in zip(members, self._route(routing, [rows[i] for i in members]), strict=True):
                    routed[i] = row
        return routed

    def _route(self, routing: Routing, rows: list[PreparedRow]) -> list[PreparedRow | HubError]:
        try:
            with self.residency.in_use(list(routing.members.values()) if routing.asks_members else []):
                weights = routing.weigh(self.host, [row.ids for row in rows], [row.request.task for row in rows])
            if routing.by_token:
                return [replace(row, weights=w) for row, w in zip(rows, weights, strict=True)]
            return [with_members(self.host, row, w) for row, w in zip(rows, weights, strict=True)]
        except (HubError, *BREAKDOWNS) as error:
            return (
                [as_hub_error(error)]
                if len(rows) == 1
                else [one for row in rows for one in self._route(routing, [row])]
            )

    def batches(self, rows: Sequence[PreparedRow]) -> list[list[int]]:
        """Which rows are computed together, by index."""
        return batches(rows, most=self.rows, tokens=self.tokens, fits=self._fit)

    def compute(self, batch: Sequence[PreparedRow], following: Sequence[PreparedRow] = ()) -> list[Answer]:
        """Compute one batch while the adapters of the one that follows are read.

        An error belongs to the row that causes it: where the batch fails, its rows are computed one by one.
        """
        try:
            return list(self._compute(batch, following))
        except (HubError, *BREAKDOWNS) as error:
            if len(batch) == 1:
                return [as_hub_error(error)]
            return [answer for row in batch for answer in self.compute([row])]

    def _compute(self, batch: Sequence[PreparedRow], following: Sequence[PreparedRow]) -> list[Answer]:
        rows = [RunningRow(prepared, self.host.tokenizer) for prepared in batch]
        running = RunningBatch(self.host)
        with self.residency.in_use(self.needed(batch)):
            self.residency.prefetch(self.needed(following))
            running.admit(rows)
            while running.rows:
                running.step()
        return [row.answer for row in rows]

    def needed(self, rows: Sequence[PreparedRow]) -> list[KnownAdapter]:
        """Adapters that rows use, each once."""
        return [self.sources.named(name) for name in dict.fromkeys(n for row in rows for n in row.target.names)]

    def _fit(self, names: Collection[str]) -> bool:
        return self.residency.fits(self.sources.named(name) for name in names)

    def close(self) -> None:
        """Stop the reading thread and leave the base with nothing active."""
        self.residency.close()
        self.host.rest()


def as_hub_error(error: Exception) -> HubError:
    """The error as one of ours."""
    return error if isinstance(error, HubError) else HubError(f"it broke down: {type(error).__name__}: {error}")
