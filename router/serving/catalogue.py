"""What a server can be asked for: the base, the store's adapters for it, and those loaded under names of their own."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from hub.errors import Conflict, NotFound, UsageError, suggest
from hub.store import Artifact
from router.engine.engine import Engine

_SERVED = ("adapter", "merge", "composition", "router")


class Catalogue:
    """Names of a server's models.

    Parameters
    ----------
    directories
        Whether a name may stand for a directory of this machine.
    name
        What the base is called.
    """

    def __init__(self, engine: Engine, *, directories: bool, name: str) -> None:
        self._engine, self._directories, self._name = engine, directories, name
        self._fits: dict[str, bool] = {}  # digest -> whether it was made for this base

    def models(self) -> list[dict[str, Any]]:
        """Entries of /v1/models: the base first."""
        host, sources = self._engine.host, self._engine.sources
        entries = [_entry(self._name, host.name, None)]
        entries += [_entry(name, sources.root(name), self._name) for name in sources.given]
        for artifact in sources.store.list(newest=True):
            if artifact.facts.type in _SERVED and self._is_for_base(artifact):
                created = int(datetime.fromisoformat(artifact.facts.created.replace("Z", "+00:00")).timestamp())
                entries.append(_entry(artifact.ref.id, str(artifact.ref), self._name, created))
        return entries

    def _is_for_base(self, artifact: Artifact) -> bool:
        """Whether an artifact was made for this base, or for none in particular: by its name, else by its weights."""
        identity, named = self._engine.host.identity, artifact.facts.base
        if named in (None, identity.repo):
            return True
        if artifact.digest not in self._fits:  # a directory's name is no part of what a base is
            made_for = artifact.manifest.base
            self._fits[artifact.digest] = (
                made_for is not None and made_for.weights_fingerprint == identity.weights_fingerprint
            )
        return self._fits[artifact.digest]

    def model(self, name: str) -> dict[str, Any]:
        """The entry of one: also of a ref with a version or an expression, which the list leaves out.

        Raises
        ------
        HubError
            No such adapter (with the nearest names), or one that cannot be used here.
        """
        entry = next((entry for entry in self.models() if entry["id"] == name), None)
        if entry is None and name in self._engine.targets.bases:
            entry = _entry(name, self._engine.host.name, None)
        if entry is None:
            target = self._engine.targets.get(name)
            entry = _entry(name, ", ".join(target.names) or name, self._name)
        return entry

    def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Let a name stand for a ref or a directory, and begin to read it.

        Raises
        ------
        HubError
            The name is taken, or what it is to stand for cannot be used; nothing has changed then.
        """
        engine, sources = self._engine, self._engine.sources
        taken = name in sources.given
        if (taken and not replace) or name in engine.targets.bases:
            raise Conflict(f"{name} is loaded already", ref=name, hint="unload it first, or load_inplace")
        source = self._source(path)
        before = sources.given_source(name)
        old = sources.known(name).name if taken and sources.artifact(name) is None else None
        sources.offer(name, source)
        engine.targets.forget()
        try:
            target = engine.targets.get(name)
        except (NotFound, UsageError):
            self._restore(name, before)
            raise
        self._drop(old)
        engine.residency.prefetch(sources.named(n) for n in target.names)

    def unload(self, name: str) -> None:
        """Forget a loaded name; rows that are under way end as they began."""
        engine = self._engine
        if name not in engine.sources.given:
            near = suggest(name, engine.sources.given)
            raise NotFound(f"{name} is not loaded", ref=name, hint=near or "GET /v1/models lists what is")
        old = engine.sources.known(name).name if engine.sources.artifact(name) is None else None
        engine.sources.withdraw(name)
        engine.targets.forget()
        self._drop(old)

    def _drop(self, resident: str | None) -> None:
        """Let go of what a name stood for alone; an artifact of the store may be in use under its ref as well."""
        if resident is not None:
            self._engine.call(lambda: self._engine.residency.drop(resident))

    def _source(self, path: str) -> str | Path:
        if not Path(path).is_dir():
            return path
        if not self._directories:
            raise UsageError(
                f"{path} is a directory, and this server loads refs of its store",
                hint="hub push it, or start the server with --allow-directories",
            )
        return Path(path)

    def _restore(self, name: str, before: Any) -> None:
        if before is None:
            self._engine.sources.withdraw(name)
        else:
            self._engine.sources.offer(name, before)
        self._engine.targets.forget()


def _entry(name: str, root: str, parent: str | None, created: int = 0) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "moduloom", "root": root, "parent": parent}
