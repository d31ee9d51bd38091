"""The local store: content-addressed blobs, the log, and an index that can be rebuilt from both."""

from __future__ import annotations

import builtins
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hub.contents.manifest_outline import outline
from hub.errors import Conflict, IntegrityError, NotFound
from hub.io import canonical_json as canonical
from hub.io.disk import disk_errors
from hub.ref import AdapterRef
from hub.storage import oci, oci_index
from hub.storage.artifact import Artifact
from hub.storage.index import Facts, Index
from hub.storage.ledger import Position
from hub.storage.memory_index import MemoryIndex
from hub.storage.query import build
from hub.storage.releases import ABSENT, Catalogue, Release
from hub.storage.vault import Vault
from hub.storage.verify import Problem, verify_release, verify_store

if TYPE_CHECKING:
    from hub.manifest import FileEntry
    from hub.storage.search import Score

__all__ = ["ABSENT", "Artifact", "Problem", "Store", "default_root"]

T = TypeVar("T")


def default_root() -> Path:
    """``$HUB_HOME``, or ``~/.moduloom``."""
    return Path(os.environ.get("HUB_HOME") or "~/.moduloom").expanduser()


class Store(Vault):
    """Artifacts on this machine.

    Parameters
    ----------
    root
        The directory; `default_root` where it is None. Nothing is made until something is written.

    Notes
    -----
    Any number of processes may share a store. The log and the blobs are the truth; the index follows the log,
    and an index that is missing, old or damaged is made anew by whoever needs it.
    """

    absent_hint = "`hub list` shows what there is; `hub pull REF --from URL` brings it here"

    def __init__(self, root: str | Path | None = None) -> None:
        super().__init__(default_root() if root is None else Path(root).expanduser())
        self._index = Index(self.root / "index.sqlite")
        self._borrowed: Index | None = None

    @property
    def where(self) -> str:
        """How messages call this place."""
        return f"the store {self.root}"

    def put(self, directory: str | Path) -> Artifact:
        """Publish an artifact directory (one with ``module.json``).

        The same version with the same digest is a no-op that checks the directory all the same.

        Raises
        ------
        Conflict
            The version is published with another digest.
        IntegrityError, GateError, ManifestError
            The directory does not hold what its manifest says, or must not be published. Nothing is changed.
        """
        from hub.io.files import open_regular
        from hub.pack import check_listing

        directory = Path(directory)
        manifest = check_listing(directory)

        def fetch(entry: FileEntry, target: Path) -> None:
            with open_regular(directory / entry.path) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)

        self.ingest(manifest, fetch, reuse=False)
        return self.get(manifest.ref)

    def get(self, ref: str | AdapterRef) -> Artifact:
        """Return the artifact a ref stands for.

        Raises
        ------
        NotFound
            With the closest names, versions or aliases as a hint.
        """
        release = self.resolve(ref)
        return self._artifact(self._ask(lambda index: index.select("a.digest = ?", (release.digest,)))[0])

    def tag(self, ref: str | AdapterRef, alias: str, *, expect: str | None = None) -> Artifact:
        """Let ``ns/name@alias`` stand for what `ref` is now; compare-and-swap where `expect` is given.

        `expect` is a version, a digest or ``"absent"``; Conflict when the alias stands elsewhere.
        """
        self.set_alias(AdapterRef.parse(ref), alias, expect=expect)
        return self.get(AdapterRef.parse(ref).at(alias=alias))

    def untag(self, name: str | AdapterRef, alias: str, *, expect: str | None = None) -> str | None:
        """Remove an alias; returns the digest it stood for."""
        return self.set_alias(AdapterRef.parse(name), alias, expect=expect, remove=True)

    def delete(self, ref: str | AdapterRef, reason: str, *, force: bool = False) -> Release:
        """Delete one version for good: no other content, and not this one either, is published under it again.

        Raises
        ------
        Conflict
            An alias stands on it; or, unless `force` is given, another artifact requires it.
        """
        release = self.resolve(ref)
        needed = sorted(self.requiring(release.digest))
        if needed and not force:
            raise Conflict(
                f"{ref} is required by {', '.join(needed[:5])}",
                ref=ref,
                digest=release.digest,
                hint="yank it instead: what requires it goes on working; --force deletes it all the same",
            )
        return self.bury(ref, reason)

    def requiring(self, digest: str) -> set[str]:
        """Refs of the artifacts whose requirements lead to a digest."""

        def target_of(ref: str) -> str | None:
            with suppress(NotFound):
                return self.resolve(ref).digest
            return None

        needs = [(source, ref, wanted) for source, relation, ref, wanted in self.edges() if relation == "requires"]
        sources = {source for source, ref, wanted in needs if (wanted or target_of(ref)) == digest}
        return {str(artifact.ref) for artifact in self.list(yanked=True) if artifact.digest in sources}

    def verify(self, ref: str | AdapterRef | None = None) -> list[Problem]:
        """Read every byte of one artifact, or of the whole store with its log and index; list what is wrong."""
        if ref is None:
            return verify_store(self, lambda: {artifact.digest for artifact in self.list(yanked=True)})
        release = self.resolve(ref)
        return verify_release(self, AdapterRef.parse(ref).at(version=release.version), release.digest)

    def rebuild_index(self) -> int:
        """Make the SQLite index and ``index.json`` anew from log and blobs; returns the number of artifacts."""
        images: dict[str, tuple[str, int]] = {}

        def load(digest: str) -> Mapping[str, Any]:  # each manifest is read once, for both
            module = self.blobs.read(digest)
            document = outline(module)
            image = oci.image_of(document, digest, len(module))
            images[digest] = canonical.digest(image), len(image)
            return document

        with self.lock():
            self._index.apply(self.ledger.read(), load, anew=True)
            oci_index.refresh(self.root, self.ledger, self.blobs, self.ledger.end(), images=images)
        return self._index.count()

    def edges(self) -> list[tuple[str, str, str, str | None]]:
        """All (digest, relation, target ref, target digest) of the artifacts here."""
        return self._ask(lambda index: index.edges())

    def catalogue(self, name: str) -> Catalogue:
        """Releases and aliases of ``ns/name``, from the index."""
        return self._ask(lambda index: index.catalogue(name))

    def names(self) -> list[str]:
        """All names, from the index."""
        return self._ask(lambda index: index.names())

    def _artifact(self, facts: Facts) -> Artifact:
        return Artifact(facts, self.blobs)

    def _appended(self) -> None:
        self._follow()

    def _ask(self, question: Callable[[Index], T]) -> T:
        """Answer from an index that has read the whole log."""
        with disk_errors(self.root):
            if not self._writable():
                return self._ask_unwritable(question)
            # Three failures of SQLite: locked for too long is an error; a full disk is read around; damage made anew.
            try:
                return question(self._current())
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    raise
                return self._ask_unwritable(question)
            except sqlite3.DatabaseError:
                with self.lock():
                    self._index.remove()
                return question(self._current())

    def _current(self) -> Index:
        at = self._index.position()
        # A line that a kill has torn makes the log longer than what was ever committed: look at its end, then.
        if at is None or (at.offset != self.ledger.size and at != self.ledger.end()):
            with self.lock():
                self._follow()
        return self._index

    def _writable(self) -> bool:
        return self.exists and os.access(self.root, os.W_OK)

    def _ask_unwritable(self, question: Callable[[Index], T]) -> T:
        """Answer for a store that this process may only read, while another one may be writing to it."""
        while True:
            end = self.ledger.end()
            answer = question(self._spare(end))
            if self.ledger.end() == end:
                return answer

    def _spare(self, end: Position) -> Index:
        """Give the store's own index where that is current and at rest, else one in memory."""
        frozen = Index(self._index.path, frozen=True)
        if frozen.exists and not frozen.path.with_name(frozen.path.name + "-wal").exists():
            with suppress(sqlite3.DatabaseError):  # damaged, and it cannot be mended here
                if frozen.position() == end:
                    return frozen
        if self._borrowed is None:
            self._borrowed = MemoryIndex()
        if self._borrowed.position() != end:
            self._borrowed.apply(self.ledger.read(), self._document, anew=True)
        return self._borrowed

    def _follow(self) -> None:
        """Bring the index up to the log; called under the lock."""
        # From where the index stands; from the start where there is none, or where the log is another one now.
        at = self._index.position()
        if at is not None and at.offset > self.ledger.end().offset:
            at = None
        try:
            self._index.apply(self.ledger.read(at), self._document, anew=at is None)
        except IntegrityError:
            if at is None:
                raise
            # The log does not go on from that position: if it is whole from its start, the position was wrong.
            self._index.apply(self.ledger.read(), self._document, anew=True)

    def _document(self, digest: str) -> Mapping[str, Any]:
        # Validated when it was admitted; the digest says that it has not changed since.
        return outline(self.blobs.read(digest))

    def search(
        self, text: str, *, limit: int = 20, yanked: bool = False, newest: bool = True, **filters: str | None
    ) -> builtins.list[Artifact]:
        """Artifacts whose name, summary, kind, task, base or labels hold all words, best match first (BM25).

        Filters as for `list`.
        """
        from hub.storage.search import digests

        asked = dict(filters)
        chosen = self._ask(lambda i: digests(i, text, limit=limit, yanked=yanked, newest=newest, filters=asked))
        return [artifact for digest in chosen for artifact in self.list(digest=digest, yanked=True)]

    def scores(self, chosen: Iterable[Artifact], metric: str) -> dict[str, builtins.list[Score]]:
        """Figures of one metric, by digest of the artifacts that have any."""
        from hub.storage.search import scores

        digests = [artifact.digest for artifact in chosen]
        return self._ask(lambda index: scores(index, digests, metric))

    def list(
        self,
        *,
        yanked: bool = False,
        newest: bool = False,
        sort: str | None = None,
        ascending: bool | None = None,
        limit: int | None = None,
        **filters: str | None,
    ) -> list[Artifact]:
        """Artifacts that pass all filters, by name and version unless `sort` says otherwise.

        Filters: name (with ``*``), namespace, version, digest, type, kind, method, task, license, base (repo or
        digest), label, language, domain, alias, text (full text, by prefix). The rest: `hub.storage.query.build`.
        """
        where, arguments, order = build(
            filters, yanked=yanked, newest=newest, sort=sort, ascending=ascending, limit=limit
        )
        chosen = self._ask(lambda index: index.select(where, arguments, order, -1 if limit is None else limit))
        return [self._artifact(facts) for facts in chosen]
