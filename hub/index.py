"""The SQLite index of a store: fast lists and searches over what the log and the blobs already say.

Derived data: it can be thrown away at any time, and follows the log by position. WAL, one connection an
operation, so threads, forks and eight processes share it without ado.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.ledger import Event, Position
from hub.ref import version_key
from hub.resolve import Catalogue, Release

SCHEMA = 2  # raise it with any change below: an index of another schema is made anew
BUSY = 30.0  # seconds to wait for another process

_TABLES = """
CREATE TABLE state (offset INTEGER NOT NULL, seq INTEGER NOT NULL, head TEXT NOT NULL);
CREATE TABLE artifacts (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, name TEXT NOT NULL, version TEXT NOT NULL,
    version_key TEXT NOT NULL, type TEXT NOT NULL, kind TEXT NOT NULL, method TEXT NOT NULL, task TEXT,
    base_repo TEXT, base_weights TEXT, base_arch TEXT, license TEXT, summary TEXT NOT NULL,
    tensors_digest TEXT NOT NULL, size INTEGER NOT NULL, created TEXT NOT NULL, yanked TEXT,
    UNIQUE (name, version_key)
);
CREATE INDEX artifacts_by_base ON artifacts (base_repo, task);
CREATE INDEX artifacts_by_weights ON artifacts (base_weights);
CREATE INDEX artifacts_by_task ON artifacts (task);
CREATE INDEX artifacts_by_kind ON artifacts (kind);
CREATE INDEX artifacts_by_created ON artifacts (created);
CREATE TABLE aliases (
    name TEXT NOT NULL, alias TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (name, alias)
) WITHOUT ROWID;
CREATE INDEX aliases_by_digest ON aliases (digest);
CREATE TABLE facets (artifact INTEGER NOT NULL, facet TEXT NOT NULL, value TEXT NOT NULL);
CREATE INDEX facets_by_value ON facets (facet, value, artifact);
CREATE TABLE metrics (
    artifact INTEGER NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL
);
CREATE INDEX metrics_by_name ON metrics (metric, artifact, value);
CREATE TABLE edges (artifact INTEGER NOT NULL, relation TEXT NOT NULL, target TEXT NOT NULL, digest TEXT);
CREATE INDEX edges_by_artifact ON edges (artifact);
CREATE VIRTUAL TABLE search USING fts5 (
    name, summary, kind, method, task, base, facets, tokenize = 'porter unicode61'
);
"""
_NAMES = ("state", "artifacts", "aliases", "facets", "metrics", "edges", "search")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the index knows of an artifact, without its manifest being read."""

    digest: str
    name: str
    version: str
    type: str
    kind: str
    method: str
    task: str | None
    base: str | None
    license: str | None
    summary: str
    size: int
    created: str
    yanked: str | None
    aliases: tuple[str, ...]


_COLUMNS = """a.digest, a.name, a.version, a.type, a.kind, a.method, a.task, a.base_repo, a.license, a.summary,
    a.size, a.created, a.yanked, (SELECT group_concat(alias, ' ') FROM aliases WHERE aliases.digest = a.digest)"""


class Index:
    """One SQLite file.

    Parameters
    ----------
    path
        The file.
    frozen
        Open it as an immutable file, for a store on a read-only disk.
    scratch
        It lives as long as this process and is nobody else's: nothing is synced.
    """

    def __init__(self, path: Path, *, frozen: bool = False, scratch: bool = False) -> None:
        self.path = path
        self.frozen = frozen
        self.scratch = scratch

    @contextmanager
    def connect(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One connection, in one transaction where it writes."""
        mode = "ro&immutable=1" if self.frozen else "rwc"
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None)
        try:
            if write:
                connection.execute(f"PRAGMA journal_mode = {'MEMORY' if self.scratch else 'WAL'}")
                connection.execute(f"PRAGMA synchronous = {'OFF' if self.scratch else 'NORMAL'}")
                connection.execute("BEGIN IMMEDIATE")
            yield connection
            if write:
                connection.execute("COMMIT")
        finally:
            connection.close()  # rolls back what was not committed

    def position(self) -> Position | None:
        """How far into the log this index has read; None where there is no index of this schema."""
        if not self.path.exists():
            return None
        with self.connect() as db:
            if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA:
                return None
            row = db.execute("SELECT offset, seq, head FROM state").fetchone()
        return Position(*row)

    def remove(self) -> None:
        """Delete a damaged index."""
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def apply(
        self,
        events: Iterable[tuple[Event, Position]],
        load: Callable[[str], Mapping[str, Any]],
        *,
        anew: bool = False,
    ) -> None:
        """Take in events of the log, in one transaction.

        Parameters
        ----------
        events
            Each with the position behind it.
        load
            Reads the manifest of a digest as plain JSON.
        anew
            Forget everything first.
        """
        with self.connect(write=True) as db:
            if anew:
                for name in _NAMES:
                    db.execute(f"DROP TABLE IF EXISTS {name}")
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA}")
                start = Position()
                db.execute("INSERT INTO state VALUES (?, ?, ?)", (start.offset, start.seq, start.head))
            at = None
            for event, behind in events:
                _apply(db, event, load)
                at = behind
            if at is not None:
                db.execute("UPDATE state SET offset = ?, seq = ?, head = ?", (at.offset, at.seq, at.head))

    def catalogue(self, name: str) -> Catalogue:
        """Releases and aliases of ``ns/name``."""
        with self.connect() as db:
            db.execute("BEGIN")  # both queries see one state
            releases = db.execute(
                "SELECT version, digest, yanked FROM artifacts WHERE name = ? ORDER BY version_key", (name,)
            ).fetchall()
            aliases = db.execute("SELECT alias, digest FROM aliases WHERE name = ?", (name,)).fetchall()
        return Catalogue(name, tuple(Release(*row) for row in releases), dict(aliases))

    def names(self) -> list[str]:
        """All names, sorted."""
        with self.connect() as db:
            return [row[0] for row in db.execute("SELECT DISTINCT name FROM artifacts ORDER BY name")]

    def select(
        self, where: str = "1", arguments: Iterable[object] = (), order: str = "", limit: int = -1
    ) -> list[Facts]:
        """Facts of the artifacts ``a`` for which an SQL condition holds."""
        order = order or "a.name, a.version_key"
        query = f"SELECT {_COLUMNS} FROM artifacts a WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608  (our own text)
        with self.connect() as db:
            rows = db.execute(query, (*arguments, limit)).fetchall()
        return [Facts(*_split(row)) for row in rows]

    def edges(self) -> list[tuple[str, str, str, str | None]]:
        """All (digest, relation, target ref, target digest): parents and requirements."""
        query = "SELECT a.digest, e.relation, e.target, e.digest FROM edges e JOIN artifacts a ON a.id = e.artifact"
        with self.connect() as db:
            return db.execute(query).fetchall()

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """All rows of all tables, sorted: two indexes of one store are equal when their dumps are."""
        with self.connect() as db:
            return {name: sorted(db.execute(f"SELECT * FROM {name}"), key=repr) for name in _NAMES}  # noqa: S608


def _split(row: tuple[Any, ...]) -> list[Any]:
    return [*row[:-1], tuple(sorted((row[-1] or "").split()))]


def _apply(db: sqlite3.Connection, event: Event, load: Callable[[str], Mapping[str, Any]]) -> None:
    if event.op == "publish":
        _insert(db, str(event.digest), load(str(event.digest)))
    elif event.op == "alias" and event.digest is None:
        db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (event.name, event.alias))
    elif event.op == "alias":
        db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (event.name, event.alias, event.digest))
    else:
        reason = (event.reason or "no reason given") if event.op == "yank" else None
        db.execute("UPDATE artifacts SET yanked = ? WHERE digest = ?", (reason, event.digest))


def _insert(db: sqlite3.Connection, digest: str, doc: Mapping[str, Any]) -> None:
    base = doc.get("base") or {}
    facts = {
        "digest": digest,
        "name": doc["name"],
        "version": doc["version"],
        "version_key": version_key(doc["version"]),
        "type": doc["type"],
        "kind": doc.get("kind", ""),
        "method": doc.get("method", ""),
        "task": doc.get("task"),
        "base_repo": base.get("repo"),
        "base_weights": base.get("weights_fingerprint"),
        "base_arch": base.get("arch_digest"),
        "license": doc.get("license"),
        "summary": doc.get("summary", ""),
        "tensors_digest": doc["tensors_digest"],
        "size": sum(entry["size"] for entry in doc.get("files", ())),
        "created": doc["created"],
    }
    marks = ", ".join(f":{name}" for name in facts)
    row = db.execute(f"INSERT INTO artifacts ({', '.join(facts)}) VALUES ({marks})", facts).lastrowid  # noqa: S608
    facets = [(facet[:-1], value) for facet in ("labels", "languages", "domains") for value in doc.get(facet, ())]
    db.executemany("INSERT INTO facets VALUES (?, ?, ?)", [(row, *facet) for facet in facets])
    db.executemany(
        "INSERT INTO metrics VALUES (?, ?, ?, ?, ?)",
        [(row, m["dataset"], m.get("split", "test"), m["metric"], m["value"]) for m in doc.get("metrics", ())],
    )
    db.executemany("INSERT INTO edges VALUES (?, ?, ?, ?)", [(row, *edge) for edge in _edges(doc)])
    words = " ".join(value for _, value in facets)
    text = [doc["name"].replace("/", " "), facts["summary"], facts["kind"], facts["method"], facts["task"]]
    db.execute(
        "INSERT INTO search (rowid, name, summary, kind, method, task, base, facets) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (row, *text, facts["base_repo"], words),
    )


def _edges(doc: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    for parent in (doc.get("lineage") or {}).get("parents", ()):
        yield "parent", parent, parent.partition("@")[2] if "@sha256:" in parent else None
    for need in doc.get("requires", ()):
        yield "requires", need["name"] + need.get("range", ""), need.get("digest")
