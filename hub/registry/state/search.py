"""Finding artifacts for people and programs, among those the caller may see."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from hub.registry.state.drafts import Recorded
from hub.registry.tokens import Caller
from hub.storage.index import Facts, Index
from hub.storage.query import build
from hub.storage.search import Score
from hub.store import Store

PAGE = 24  # artifacts on a page
_CACHED = 64  # callers' sets of facets


def visible(caller: Caller, name: str, recorded: Recorded) -> bool:
    """Whether a caller may see a repository."""
    repo = recorded.of(name)
    namespace = name.partition("/")[0]
    return not repo.deleted and (caller.may_read(namespace) or (caller.public and not repo.private))


@dataclass(frozen=True)
class Query:
    """What a visitor looks for; empty means any."""

    text: str = ""
    base: str = ""
    kind: str = ""
    task: str = ""
    metric: str = ""
    namespace: str = ""
    sort: str = "created"
    page: int = 1


@dataclass(frozen=True)
class Facets:
    """Values to filter by, each with the count of adapters, most first."""

    bases: list[tuple[str, int]] = field(default_factory=list)
    kinds: list[tuple[str, int]] = field(default_factory=list)
    tasks: list[tuple[str, int]] = field(default_factory=list)
    metrics: list[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """One page of what was found; `more` says whether there is another."""

    facts: list[Facts]
    total: int
    more: bool


class StoreSearch:
    """The catalogue of a store: queries, facets and figures out of its index."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._index = Index(store.root / "index.sqlite")
        self._facets: dict[tuple[int, str], Facets] = {}
        self._guard = threading.Lock()

    def find(self, query: Query, caller: Caller, recorded: Recorded) -> Results:
        """Newest release of each adapter that fits; by a metric where one is asked for, the best first."""
        filters = {
            "text": query.text or None,
            "base": query.base or None,
            "kind": query.kind or None,
            "task": query.task or None,
            "namespace": query.namespace or None,
        }
        start = (query.page - 1) * PAGE
        facts, total = self.select(filters, query.metric or query.sort, caller, recorded, start + PAGE)
        return Results(facts[start:], total, total > start + PAGE)

    def select(
        self,
        filters: dict[str, str | None],
        sort: str | None,
        caller: Caller,
        recorded: Recorded,
        count: int,
    ) -> tuple[list[Facts], int]:
        """Newest releases of what the caller may see: the first `count` (-1: all), and how many there are."""
        where, arguments, order = build(filters, yanked=False, newest=True, sort=sort, ascending=None)
        where = f"a.name NOT IN (SELECT value FROM json_each(?)) AND ({where})"  # noqa: S608  (our own text)
        arguments = [self._hidden(caller, recorded), *arguments]
        self.store.list(limit=0)  # lets the store bring its index up to date
        if not self._index.path.exists():  # nothing was ever published
            return [], 0
        facts = self._index.select(where, arguments, order, count)
        if 0 <= count <= len(facts):
            query = f"SELECT count(*) FROM artifacts a WHERE {where}"  # noqa: S608  (our own text)
            with self._index.connect() as db:
                return facts, int(db.execute(query, arguments[: where.count("?")]).fetchone()[0])
        return facts, len(facts)

    def _hidden(self, caller: Caller, recorded: Recorded) -> str:
        """Names that the caller may not see, as a JSON list; the index compares them without case."""
        everything = caller.public and recorded.visibility == "public"
        names = recorded if everything else {*recorded, *self.store.names()}
        return json.dumps(sorted(name for name in names if not visible(caller, name, recorded)))

    def facets(self, caller: Caller, recorded: Recorded) -> Facets:
        """Values of all that the caller may see; kept until the store's log grows."""
        hidden = self._hidden(caller, recorded)
        key = (self.store.ledger.size, hidden)
        with self._guard:
            if key in self._facets:
                return self._facets[key]
        bases, kinds, tasks = (self._count(column, hidden) for column in ("base_repo", "kind", "task"))
        facets = Facets(bases, kinds, tasks, self._metrics(hidden))
        with self._guard:
            if len(self._facets) >= _CACHED:
                self._facets.clear()
            self._facets[key] = facets
        return facets

    def _count(self, column: str, hidden: str) -> list[tuple[str, int]]:
        query = f"""SELECT {column}, count(DISTINCT name) AS n FROM artifacts
            WHERE yanked IS NULL AND {column} <> '' AND name NOT IN (SELECT value FROM json_each(?))
            GROUP BY {column} ORDER BY n DESC, {column}"""  # noqa: S608  (our own column names)
        return self._rows(query, hidden)

    def _metrics(self, hidden: str) -> list[tuple[str, int]]:
        query = """SELECT m.metric, count(DISTINCT a.name) AS n FROM metrics m JOIN artifacts a ON a.id = m.artifact
            WHERE a.yanked IS NULL AND a.name NOT IN (SELECT value FROM json_each(?))
            GROUP BY m.metric ORDER BY n DESC, m.metric"""
        return self._rows(query, hidden)

    def _rows(self, query: str, hidden: str) -> list[tuple[str, int]]:
        if not self._index.path.exists():  # nothing was ever published
            return []
        with self._index.connect() as db:
            return [(row[0], row[1]) for row in db.execute(query, (hidden,))]

    def scores(self, digests: Iterable[str]) -> dict[str, list[Score]]:
        """Figures of some artifacts, by digest."""
        scores: dict[str, list[Score]] = {digest: [] for digest in digests}
        if not scores or not self._index.path.exists():
            return scores
        query = """SELECT a.digest, m.metric, m.value, m.dataset, m.split FROM metrics m
            JOIN artifacts a ON a.id = m.artifact WHERE a.digest IN (SELECT value FROM json_each(?)) ORDER BY m.rowid"""
        with self._index.connect() as db:
            for digest, *score in db.execute(query, (json.dumps(list(scores)),)):
                scores[digest].append(Score(*score))
        return scores
