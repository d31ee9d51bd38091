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

from hub.errors import NotFound
from hub.io.files import share
from hub.ref import version_key
from hub.storage.ledger import Event, Position
from hub.storage.releases import Catalogue, Release, Tombstone

SCHEMA = 6  # raise it with any change below: an index of another schema is made anew
BUSY = 30.0  # seconds to wait for another process

_TABLES = """
CREATE TABLE state (offset INTEGER NOT NULL, seq INTEGER NOT NULL, head TEXT NOT NULL);
CREATE TABLE artifacts (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, name TEXT NOT NULL COLLATE NOCASE, version TEXT NOT NULL,
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
    name TEXT NOT NULL COLLATE NOCASE, alias TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (name, alias)
) WITHOUT ROWID;
CREATE INDEX aliases_by_digest ON aliases (digest);
CREATE TABLE tombstones (
    name TEXT NOT NULL COLLATE NOCASE, version_key TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    reason TEXT, final INTEGER NOT NULL, PRIMARY KEY (name, version_key)
) WITHOUT ROWID;
CREATE TABLE facets (artifact INTEGER NOT NULL, facet TEXT NOT NULL, value TEXT NOT NULL);
CREATE INDEX facets_by_value ON facets (facet, value, artifact);
CREATE TABLE metrics (
    artifact INTEGER NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL
);
CREATE INDEX metrics_by_name ON metrics (metric, artifact, value);
CREATE INDEX metrics_by_value ON metrics (metric, value, artifact);
CREATE TABLE edges (artifact INTEGER NOT NULL, relation TEXT NOT NULL, target TEXT NOT NULL, digest TEXT);
CREATE INDEX edges_by_artifact ON edges (artifact);
CREATE VIRTUAL TABLE search USING fts5 (
    name, summary, kind, method, task, base, facets, tokenize = 'porter unicode61'
);
"""
_NAMES = ("state", "artifacts", "aliases", "tombstones", "facets", "metrics", "edges", "search")
_GONE = ("delete", "evict")
_BATCH = 500  # publications whose rows are written at once
# What a publication writes; what was evicted is not gone any more when it comes back.
_INSERTS = {
    "artifacts": """INSERT INTO artifacts (id, digest, name, version, version_key, type, kind, method, task, base_repo,
        base_weights, base_arch, license, summary, tensors_digest, size, created)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
    "facets": "INSERT INTO facets VALUES (?, ?, ?)",
    "metrics": "INSERT INTO metrics VALUES (?, ?, ?, ?, ?)",
    "edges": "INSERT INTO edges VALUES (?, ?, ?, ?)",
    "search": """INSERT INTO search (rowid, name, summary, kind, method, task, base, facets)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
    "tombstones": "DELETE FROM tombstones WHERE digest = ?",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the index knows of an artifact, without its manifest being read; `created` is when this store got it."""

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
    """

    def __init__(self, path: Path, *, frozen: bool = False) -> None:
        self.path = path
        self.frozen = frozen

    @property
    def exists(self) -> bool:
        """Whether there is anything to connect to."""
        return self.path.exists()

    @contextmanager
    def connect(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One connection, in one transaction where it writes."""
        if write and not self.exists:  # made here, for the group of its directory; SQLite's other files follow it
            self.path.touch()
            share(self.path)
        mode = "ro&immutable=1" if self.frozen else "rwc"
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None)
        try:
            if write:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("BEGIN IMMEDIATE")
            yield connection
            if write:
                connection.execute("COMMIT")
        except UnicodeDecodeError as error:  # sqlite3 quotes damaged pages in its messages
            raise sqlite3.DatabaseError(f"the index is damaged: {error}") from error
        finally:
            connection.close()  # rolls back what was not committed

    def position(self) -> Position | None:
        """How far into the log this index has read; None where there is no index of this schema."""
        if not self.exists:
            return None
        with self.connect() as db:
            if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA:
                return None
            row = db.execute("SELECT offset, seq, head FROM state").fetchone()
        return Position(*_of_types(row, int, int, str))

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
            at = _Writer(db, load).take(events)
            if at is not None:
                db.execute("UPDATE state SET offset = ?, seq = ?, head = ?", (at.offset, at.seq, at.head))

    def catalogue(self, name: str) -> Catalogue:
        """Releases and aliases of ``ns/name``."""
        with self.connect() as db:
            db.execute("BEGIN")  # both queries see one state
            releases = db.execute(
                "SELECT version, digest, yanked FROM artifacts WHERE name = ? ORDER BY version_key", (name,)
            ).fetchall()
            last = db.execute("SELECT name FROM artifacts WHERE name = ? ORDER BY id DESC LIMIT 1", (name,)).fetchone()
            aliases = db.execute("SELECT alias, digest FROM aliases WHERE name = ?", (name,)).fetchall()
            gone = db.execute(
                "SELECT version, digest, reason, final FROM tombstones WHERE name = ? ORDER BY version_key", (name,)
            ).fetchall()
        tombstones = tuple(Tombstone(version, digest, reason, bool(final)) for version, digest, reason, final in gone)
        in_order = tuple(Release(*_of_types(row, str, str)) for row in releases)
        return Catalogue(
            last[0] if last else name, in_order, dict(_of_types(row, str, str) for row in aliases), tombstones
        )

    def count(self) -> int:
        """Number of artifacts."""
        with self.connect() as db:
            return int(db.execute("SELECT count(*) FROM artifacts").fetchone()[0])

    def names(self) -> list[str]:
        """All names, sorted."""
        last = "SELECT max(id) FROM artifacts GROUP BY name"  # as it was written last
        with self.connect() as db:
            query = f"SELECT name FROM artifacts WHERE id IN ({last}) ORDER BY name"  # noqa: S608  (our own text)
            return [row[0] for row in db.execute(query)]

    def select(
        self, where: str = "1", arguments: Iterable[object] = (), order: str = "", limit: int = -1
    ) -> list[Facts]:
        """Facts of the artifacts ``a`` for which an SQL condition holds; `arguments`: its own, then the order's."""
        order = order or "a.name, a.version_key"
        values = tuple(arguments)
        if limit >= 0:  # sort the ids alone, then fetch what is shown
            where = f"a.id IN (SELECT a.id FROM artifacts a WHERE {where} ORDER BY {order} LIMIT ?)"  # noqa: S608
            values = (*values, limit, *values[len(values) - order.count("?") :])
        query = f"SELECT {_COLUMNS} FROM artifacts a WHERE {where} ORDER BY {order}"  # noqa: S608  (our own text)
        with self.connect() as db:
            rows = db.execute(query, values).fetchall()
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


def _of_types(row: tuple[Any, ...] | None, *types: type) -> tuple[Any, ...]:
    """A row whose first values are of these types; anything else is damage, after which the index is made anew."""
    if row is None or not all(isinstance(value, kind) for value, kind in zip(row, types, strict=False)):
        raise sqlite3.DatabaseError("the index holds values of other types")
    return row


def _split(row: tuple[Any, ...]) -> list[Any]:
    _of_types(row, str, str, str, str, str, str)
    return [*row[:-1], tuple(sorted((row[-1] or "").split()))]


class _Writer:
    """Events on their way into the tables; rows of what is published gather, since one statement for many is cheap."""

    def __init__(self, db: sqlite3.Connection, load: Callable[[str], Mapping[str, Any]]) -> None:
        self._db, self._load = db, load
        self._rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _INSERTS}

    def take(self, events: Iterable[tuple[Event, Position]]) -> Position | None:
        """Apply events; returns the position behind the last one, None where there was none."""
        # A manifest that is missing is an error only where no later line says that it was deleted.
        at, lost = None, dict[str, NotFound]()
        for event, behind in events:
            at, digest = behind, str(event.digest)
            if event.op == "publish":  # its rows gather until a line needs them in the tables
                try:
                    document = self._load(digest)
                except NotFound as error:
                    lost[digest] = error
                else:
                    self._publish(behind.seq, digest, event.time or "1970-01-01T00:00:00Z", document)
                continue
            self._flush()  # what this line changes may be among the rows that wait
            if event.op in _GONE:
                lost.pop(digest, None)
            _change(self._db, event)
        if lost:
            raise next(iter(lost.values()))
        self._flush()
        return at

    def _publish(self, row: int, digest: str, time: str, doc: Mapping[str, Any]) -> None:
        rows, base = self._rows, doc.get("base") or {}
        name, version, summary = doc["name"], doc["version"], doc.get("summary", "")
        kind, method, task = doc.get("kind", ""), doc.get("method", ""), doc.get("task")
        weights, arch = base.get("weights_fingerprint"), base.get("arch_digest")
        size = sum(entry["size"] for entry in doc.get("files", ()))
        key = version_key(version)
        facts = (row, digest, name, version, key, doc["type"], kind, method, task, base.get("repo"), weights, arch)
        more = (doc.get("license"), summary, doc["tensors_digest"], size, time)
        rows["artifacts"].append((*facts, *more))
        facets = [(facet[:-1], value) for facet in ("labels", "languages", "domains") for value in doc.get(facet, ())]
        rows["facets"] += [(row, *facet) for facet in facets]
        rows["metrics"] += [
            (row, metric["dataset"], metric.get("split", "test"), metric["metric"], metric["value"])
            for metric in doc.get("metrics", ())
        ]
        rows["edges"] += [(row, *edge) for edge in _edges(doc)]
        words = " ".join(value for _, value in facets)
        rows["search"].append((row, name.replace("/", " "), summary, kind, method, task, base.get("repo"), words))
        rows["tombstones"].append((digest,))
        if len(rows["artifacts"]) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        for table, statement in _INSERTS.items():
            if rows := self._rows[table]:
                self._db.executemany(statement, rows)
                rows.clear()


def _change(db: sqlite3.Connection, event: Event) -> None:
    if event.op in _GONE:
        _remove(db, event)
    elif event.op == "alias" and event.digest is None:
        db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (event.name, event.alias))
    elif event.op == "alias":
        db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (event.name, event.alias, event.digest))
    else:
        reason = (event.reason or "no reason given") if event.op == "yank" else None
        db.execute("UPDATE artifacts SET yanked = ? WHERE digest = ?", (reason, event.digest))


def _remove(db: sqlite3.Connection, event: Event) -> None:
    row = db.execute("SELECT id FROM artifacts WHERE digest = ?", (event.digest,)).fetchone()
    for table in ("facets", "metrics", "edges") if row else ():
        db.execute(f"DELETE FROM {table} WHERE artifact = ?", row)  # noqa: S608  (our own names)
    if row:
        db.execute("DELETE FROM search WHERE rowid = ?", row)
        db.execute("DELETE FROM artifacts WHERE id = ?", row)
    version, final = str(event.version), int(event.op == "delete")
    values = (event.name, version_key(version), version, event.digest, event.reason, final)
    db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?, ?, ?)", values)


def _edges(doc: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    for parent in (doc.get("lineage") or {}).get("parents", ()):
        yield "parent", parent, parent.partition("@")[2] if "@sha256:" in parent else None
    for need in doc.get("requires", ()):
        yield "requires", need["name"] + need.get("range", ""), need.get("digest")
