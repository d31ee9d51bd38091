"""What a registry keeps beside the store: repositories, draft revisions, branches, uploads. One SQLite file.

SQLite's transactions make every change whole or not at all; the bytes of drafts are blobs, adopted before the
transaction that names them, so a kill leaves an unnamed blob at worst, which `Drafts.sweep` removes.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hub.errors import StoreError
from hub.io.disk import disk_errors
from hub.io.files import make_directory, share
from hub.ref import name_key
from hub.registry.state.git_ids import File
from hub.storage.blobs import Blobs
from hub.storage.staging import Staging

SCHEMA = 4
BUSY = 30.0  # seconds to wait for another writer
GRACE = 3600.0  # seconds that a blob may wait for the transaction that names it
STRAY = 30 * 86400.0  # seconds that an upload that no commit took is kept

# Names of repositories are compared without case, those of branches and tags are not.
_TABLES = {
    "repos": """name TEXT PRIMARY KEY COLLATE NOCASE, visibility TEXT NOT NULL, gated TEXT NOT NULL,
        created REAL NOT NULL, deleted INTEGER NOT NULL DEFAULT 0""",
    "commits": """repo TEXT NOT NULL COLLATE NOCASE, oid TEXT NOT NULL, parent TEXT, tree TEXT NOT NULL,
        author TEXT NOT NULL, time REAL NOT NULL, title TEXT NOT NULL, message TEXT NOT NULL,
        PRIMARY KEY (repo, oid)""",
    "branches": "repo TEXT NOT NULL COLLATE NOCASE, name TEXT NOT NULL, oid TEXT NOT NULL, PRIMARY KEY (repo, name)",
    "tags": "repo TEXT NOT NULL COLLATE NOCASE, name TEXT NOT NULL, oid TEXT NOT NULL, PRIMARY KEY (repo, name)",
    "origins": """repo TEXT NOT NULL COLLATE NOCASE, digest TEXT NOT NULL, oid TEXT NOT NULL, author TEXT NOT NULL,
        PRIMARY KEY (repo, digest)""",
    "uploads": """repo TEXT NOT NULL COLLATE NOCASE, sha256 TEXT NOT NULL, size INTEGER NOT NULL, time REAL NOT NULL,
        PRIMARY KEY (repo, sha256)""",
    "version_tags": """repo TEXT NOT NULL COLLATE NOCASE, version TEXT NOT NULL, tag TEXT NOT NULL,
        PRIMARY KEY (repo, version)""",
    "moves": "old TEXT PRIMARY KEY COLLATE NOCASE, repo TEXT NOT NULL COLLATE NOCASE",
}
_OF_REPO = ("commits", "branches", "tags", "uploads", "version_tags", "moves")


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository: ``public`` or ``private``.

    `gated` is ``auto``, ``manual`` or empty: where it is gated, its files need read access even when it is public.
    Nobody asks for access here, so the two words mean the same; a client reads the one that it wrote.
    """

    name: str
    visibility: str = "public"
    gated: str = ""
    created: float = 0.0
    deleted: bool = False

    @property
    def private(self) -> bool:
        """Whether it is hidden from callers without read access."""
        return self.visibility != "public"


class Recorded(dict[str, Repo]):
    """Repositories with a row of their own, by the key of their name, and the visibility of all others."""

    def __init__(self, repos: Mapping[str, Repo], visibility: str) -> None:
        super().__init__(repos)
        self.visibility = visibility

    def of(self, name: str) -> Repo:
        """Repository of a name, which may have no row."""
        return self.get(name_key(name)) or Repo(name, self.visibility)


@dataclass(frozen=True, slots=True)
class Commit:
    """One draft revision."""

    oid: str
    parent: str | None
    tree: Mapping[str, File]
    author: str
    time: float
    title: str
    message: str


class Drafts:
    """The SQLite file and the blobs of a registry, below the directory ``registry`` of its store.

    Parameters
    ----------
    root
        That directory.
    keep
        Seconds after which a draft that no branch and no tag stands for is forgotten; None keeps all, since somebody
        may have pinned its commit.
    """

    def __init__(self, root: Path, keep: float | None = None) -> None:
        self.keep = keep
        self.root = root
        self.path = root / "registry.sqlite"
        self._local = threading.local()
        self._turn = threading.RLock()  # writers of this process queue here; SQLite would have them poll
        self._swept = time.monotonic()
        self.blobs = Blobs(root)
        self.staging = Staging(root)
        with disk_errors(root):
            make_directory(self.blobs.directory)
            self._create()

    def _create(self) -> None:
        with self.change() as db:
            schema = db.execute("PRAGMA user_version").fetchone()[0]
            if schema < SCHEMA:
                _migrate(db)
                db.execute(f"PRAGMA user_version = {SCHEMA}")
            elif schema > SCHEMA:
                raise StoreError(
                    f"{self.path} has schema {schema}, this version reads {SCHEMA}",
                    path=self.path,
                    hint="upgrade moduloom",
                )

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Connection of this thread, all of whose queries see one state."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that may write; whole or not at all, durable when it ends."""
        with disk_errors(self.root), self._turn, self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        # A connection a thread, since opening one costs more than most questions. What reads inside of a change
        # joins its transaction.
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            if not self.path.exists():
                self.path.touch()
                share(self.path)
            connection = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._local.connection = connection
        if connection.in_transaction:
            yield connection
            return
        connection.execute(begin)
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def tidy(self) -> None:
        """Sweep, where that was not done for a while."""
        if time.monotonic() - self._swept > GRACE:
            self.sweep()

    def sweep(self, now: float | None = None) -> int:
        """Forget stray uploads, superseded drafts where `keep` says so, and blobs that nothing names; counts those."""
        now, self._swept = time.time() if now is None else now, time.monotonic()
        with self.change() as db:
            if self.keep is not None:
                db.execute(
                    """DELETE FROM commits WHERE time < ?
                    AND NOT EXISTS (SELECT 1 FROM branches b WHERE b.repo = commits.repo AND b.oid = commits.oid)
                    AND NOT EXISTS (SELECT 1 FROM tags t WHERE t.repo = commits.repo AND t.oid = commits.oid)""",
                    (now - self.keep,),
                )
            db.execute("DELETE FROM uploads WHERE time < ?", (now - STRAY,))
            named = {row[0] for row in db.execute("SELECT sha256 FROM uploads")}
            for row in db.execute("SELECT tree FROM commits"):
                named.update(file.sha256 for file in load_tree(row[0]).values())
            count = 0
            for digest in self.blobs:
                path = self.blobs.path(digest)
                if digest.removeprefix("sha256:") not in named and path.stat().st_mtime < now - GRACE:
                    path.unlink()
                    count += 1
        return count


def _migrate(db: sqlite3.Connection) -> None:
    """Make the tables, with the rows of those of an earlier schema."""
    before = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, columns in _TABLES.items():
        if table in before:
            db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        db.execute(f"CREATE TABLE {table} ({columns}) WITHOUT ROWID")
        if table in before:
            db.execute(f"INSERT INTO {table} SELECT * FROM old_{table}")  # noqa: S608  (our own names)
            db.execute(f"DROP TABLE old_{table}")
    # Schema 1 had a number there.
    db.execute("UPDATE repos SET gated = CASE gated WHEN '0' THEN '' WHEN '1' THEN 'manual' ELSE gated END")


def dump_tree(tree: Mapping[str, File]) -> str:
    """Tree as the text kept in the table."""
    return json.dumps({path: [file.sha256, file.size] for path, file in sorted(tree.items())})


def load_tree(text: str) -> dict[str, File]:
    """Tree of that text."""
    return {path: File(*entry) for path, entry in json.loads(text).items()}


def find_repo(db: sqlite3.Connection, name: str) -> Repo | None:
    """Row of a repository, deleted ones too."""
    row = db.execute("SELECT name, visibility, gated, created, deleted FROM repos WHERE name = ?", (name,)).fetchone()
    return Repo(row[0], row[1], row[2], row[3], bool(row[4])) if row else None


def save_repo(db: sqlite3.Connection, repo: Repo) -> None:
    """Write the row of a repository."""
    row = (repo.name, repo.visibility, repo.gated, repo.created, int(repo.deleted))
    db.execute("INSERT OR REPLACE INTO repos VALUES (?, ?, ?, ?, ?)", row)


def forget(db: sqlite3.Connection, name: str) -> None:
    """Drop all drafts of a repository."""
    for table in _OF_REPO:
        db.execute(f"DELETE FROM {table} WHERE repo = ?", (name,))  # noqa: S608  (our own names)


def rename(db: sqlite3.Connection, old: str, new: str) -> None:
    """Let all that is kept of a repository be of another name, and the old name lead there."""
    for table in _OF_REPO:
        db.execute(f"UPDATE {table} SET repo = ? WHERE repo = ?", (new, old))  # noqa: S608  (our own names)
    db.execute("UPDATE repos SET name = ? WHERE name = ?", (new, old))
    db.execute("DELETE FROM moves WHERE old = ?", (new,))
    db.execute("INSERT OR REPLACE INTO moves VALUES (?, ?)", (old, new))


def moved_to(db: sqlite3.Connection, name: str) -> str | None:
    """Name that a repository bears now, where it once bore this one."""
    row = db.execute("SELECT repo FROM moves WHERE old = ?", (name,)).fetchone()
    return row[0] if row else None


def find_commit(db: sqlite3.Connection, repo: str, oid: str) -> Commit | None:
    """Draft revision of that id."""
    row = db.execute(
        "SELECT oid, parent, tree, author, time, title, message FROM commits WHERE repo = ? AND oid = ?", (repo, oid)
    ).fetchone()
    return Commit(row[0], row[1], load_tree(row[2]), *row[3:]) if row else None


def save_commit(db: sqlite3.Connection, repo: str, commit: Commit, branch: str) -> None:
    """Add a draft revision and move the branch to it."""
    row = (commit.oid, commit.parent, dump_tree(commit.tree), commit.author, commit.time, commit.title, commit.message)
    db.execute("INSERT OR IGNORE INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (repo, *row))
    db.execute("INSERT OR REPLACE INTO branches VALUES (?, ?, ?)", (repo, branch, commit.oid))


def find_name(db: sqlite3.Connection, table: str, repo: str, name: str) -> str | None:
    """Commit id of one of the ``branches`` or ``tags`` of a repository."""
    row = db.execute(f"SELECT oid FROM {table} WHERE repo = ? AND name = ?", (repo, name)).fetchone()  # noqa: S608
    return row[0] if row else None


def version_tags(db: sqlite3.Connection, repo: str) -> dict[str, str]:
    """Version -> the tag by which a client published it, as it was written (``v1.0`` for 1.0)."""
    return dict(db.execute("SELECT version, tag FROM version_tags WHERE repo = ?", (repo,)))


def pairs(db: sqlite3.Connection, table: str, repo: str) -> dict[str, str]:
    """Name -> commit id of the ``branches`` or ``tags`` of a repository."""
    return dict(db.execute(f"SELECT name, oid FROM {table} WHERE repo = ? ORDER BY name", (repo,)))  # noqa: S608
