"""Full-text search over the index, best match first, and the figures of what was found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hub.storage.query import build, match

if TYPE_CHECKING:
    from hub.storage.index import Index

# Weights of the columns name, summary, kind, method, task, base, facets in BM25.
_BM25 = "bm25(search, 8.0, 4.0, 2.0, 2.0, 2.0, 1.0, 2.0)"
RANKED = 3_000  # of what matches, the newest are ranked; a word that is everywhere tells nothing of the others


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of an artifact."""

    metric: str
    value: float
    dataset: str
    split: str


def digests(index: Index, text: str, *, limit: int, yanked: bool, newest: bool, filters: dict[str, Any]) -> list[str]:
    """Digests of what matches, best first; ``filters`` as for `hub.storage.query.build`."""
    where, arguments, _ = build(filters, yanked=yanked, newest=newest, sort=None, ascending=None)
    query = f"""WITH hits AS MATERIALIZED (
            SELECT a.id, {_BM25} AS score FROM search CROSS JOIN artifacts a ON a.id = search.rowid
            WHERE search MATCH ? AND {where} ORDER BY search.rowid DESC LIMIT {RANKED})
        SELECT a.digest FROM hits JOIN artifacts a ON a.id = hits.id ORDER BY hits.score, a.name LIMIT ?"""  # noqa: S608
    with index.connect() as db:
        return [row[0] for row in db.execute(query, (match(text), *arguments, limit))]


def scores(index: Index, chosen: Iterable[str], metric: str) -> dict[str, list[Score]]:
    """Figures of one metric by digest."""
    query = """SELECT a.digest, m.metric, m.value, m.dataset, m.split FROM metrics m
        JOIN artifacts a ON a.id = m.artifact
        WHERE m.metric = ? AND a.digest IN (SELECT value FROM json_each(?)) ORDER BY m.rowid"""
    by_digest: dict[str, list[Score]] = {}
    with index.connect() as db:
        for digest, *rest in db.execute(query, (metric, json.dumps(list(chosen)))):
            by_digest.setdefault(digest, []).append(Score(*rest))
    return by_digest
