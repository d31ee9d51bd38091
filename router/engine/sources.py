"""Where adapters come from: refs in a store, directories (ours or PEFT's), adapters in memory; read when needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from compose.formats import directory as interop
from compose.kind.adapter import Adapter
from compose.planning.plan import Leaf
from compose.planning.unfold import Resolved
from compose.runtime.model_runtime import leaf
from hub.contents.tensor_files import read_header
from hub.errors import NotFound, UsageError, did_you_mean
from hub.manifest import Manifest
from hub.ref import AdapterRef
from hub.store import Artifact, Store
from router.engine.host import Host

Source: TypeAlias = Adapter | Artifact | str | Path
_HEADED = {"classification", "regression"}


@dataclass(frozen=True)
class Known:
    """An adapter that can be made resident.

    Attributes
    ----------
    name
        What it is called on the base: one name however a ref was written.
    facts
        What a plan needs to know of it.
    labels
        Classes of its head; () without one.
    task, max_length, front, bytes
        "generate", "classify" or "regress"; tokens it was trained on at most; places that it takes in front of a text
        (a prompt's or a prefix's); size of its tensors.
    """

    name: str
    source: Artifact | Path | Adapter
    facts: Resolved
    labels: tuple[str, ...]
    task: str
    max_length: int | None
    front: int
    bytes: int

    def read(self, host: Host) -> Adapter:
        """Read and check its tensors and make the adapter, frozen; nothing on the base changes."""
        if isinstance(self.source, Adapter):
            return self.source
        view, sites = host.heads.view(len(self.labels) or None, host.runtime.sites)
        if isinstance(self.source, Path):
            adapter = interop.read(self.source, sites, view, name=self.name)
            adapter.labels = self.labels
            return adapter
        files = self.source
        kind, config = interop.parse_config(json.loads(files.read(interop.CONFIG)), sites)
        extra = files.file(interop.EXTRA) if interop.EXTRA in files.files else None
        tensors = interop.read_tensors(files.file(interop.WEIGHTS), extra)
        adapter = interop.build(kind, config, tensors, sites, view, name=self.name)
        adapter.labels = self.labels
        return adapter


class Sources:
    """All adapters that can be named: those given by name, and those of the store.

    Attributes
    ----------
    store
        Where refs are looked up.
    pins
        Text of a ref -> digest: what each ref has stood for; refs found in it are read so (see `hub run`'s journal).
    """

    def __init__(self, host: Host, store: Store, given: Mapping[str, Source] | None = None) -> None:
        self._host, self.store = host, store
        self._given = dict(given or {})
        self._offers = Counter(list(self._given))  # the second directory of a name is another resident
        self._known: dict[str, Known] = {}
        self._named: dict[str, Known] = {}
        self.pins: dict[str, str] = {}

    def offer(self, name: str, source: Source) -> None:
        """Make a source known under a name of its own."""
        self._given[name] = source
        self._offers[name] += 1
        self._known.pop(name, None)

    def withdraw(self, name: str) -> bool:
        """Forget a name that was offered; whether it was."""
        self._known.pop(name, None)
        return self._given.pop(name, None) is not None

    def given_source(self, name: str) -> Source | None:
        """What a name was offered for."""
        return self._given.get(name)

    def root(self, name: str) -> str:
        """Where an offered adapter comes from, for people."""
        source = self._given[name]
        return name if isinstance(source, Adapter) else str(getattr(source, "ref", source))

    @property
    def given(self) -> tuple[str, ...]:
        """Names that were offered."""
        return tuple(self._given)

    def known(self, text: str) -> Known:
        """The adapter that a name or ref stands for. Raises NotFound with the nearest names."""
        if text not in self._known:
            source: Source | None = self.artifact(text) or self._given.get(text)
            found = self._look(text, self._host.runtime.adapters[text] if source is None else source)
            self._known[text] = self._named[found.name] = found
        return self._known[text]

    def named(self, name: str) -> Known:
        """The adapter of a resident's name, which :meth:`known` has given before."""
        return self._named[name]

    def artifact(self, text: str) -> Artifact | None:
        """The store's artifact that a ref, or a name offered for one, stands for; None for other adapters."""
        source = self._given.get(text)
        if source is None:
            return None if self._in_memory(text) else self._artifact(text)
        if isinstance(source, str | Path) and not Path(source).is_dir():
            return self._artifact(str(source))
        return source if isinstance(source, Artifact) else None

    def _in_memory(self, text: str) -> bool:
        """Whether somebody else has put it on the base, and not a reading of ours that was withdrawn since."""
        read = self._named.get(text)
        return text in self._host.runtime.adapters and (read is None or isinstance(read.source, Adapter))

    def _artifact(self, text: str) -> Artifact:
        ref = AdapterRef.parse(text)
        if text in self.pins:
            return self.store.get(AdapterRef.parse(ref.id).at(digest=self.pins[text]))
        try:
            found = self.store.get(ref)
        except NotFound as error:
            near = did_you_mean(text, self._given)
            if near and (error.hint is None or "did you mean" not in error.hint):
                raise NotFound(error.message, ref=text, hint=f"did you mean {' or '.join(near)}?") from error
            raise
        self.pins[text] = found.digest
        return found

    def _look(self, text: str, source: Source) -> Known:
        if isinstance(source, Adapter):
            task = "classify" if source.labels else "generate"
            return Known(
                text, source, leaf(source), source.labels, task, None, _front(vars(source.config)), size_of(source)
            )
        if isinstance(source, Artifact):
            return self._of_artifact(str(source.ref), source)
        path = Path(source)
        kind, fields = interop.peek(path)
        files = [path / name for name in (interop.WEIGHTS, interop.EXTRA) if (path / name).exists()]
        labels, size = self._classes(files, ()), sum(f.stat().st_size for f in files)
        facts = Leaf(kind, labels=labels, hyperparameters={"modules_to_save": fields.get("modules_to_save") or ()})
        name = text if self._offers[text] < 2 else f"{text}#{self._offers[text]}"
        return Known(name, path, facts, labels, _task_of(labels), None, _front(fields), size)

    def _of_artifact(self, name: str, artifact: Artifact) -> Known:
        facts: Manifest = artifact.manifest
        labels: tuple[str, ...] = ()
        if facts.task in _HEADED:
            if self._host.translates:
                raise UsageError(
                    f"{name} is a head for {facts.task}, and {self._host.name} is an encoder-decoder",
                    ref=name,
                    hint="compose.load(base, task='classification') runs it",
                )
            files = [artifact.file(f) for f in (interop.WEIGHTS, interop.EXTRA) if f in artifact.files]
            labels = self._classes(files, facts.labels)
        task = "regress" if facts.task == "regression" else _task_of(labels)
        front = _front(json.loads(artifact.read(interop.CONFIG)))
        return Known(name, artifact, facts, labels, task, _max_length(facts), front, artifact.facts.size)

    def _classes(self, files: list[Path], named: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the classes: the given ones, or as many numbers as the head tells apart."""
        shapes = {t.name: t.shape for file in files for t in read_header(file.resolve()).tensors}
        count = self._host.heads.classes(shapes)
        if count is None:
            return ()
        return tuple(named) if len(named) == count else tuple(f"LABEL_{i}" for i in range(count))


def _task_of(labels: tuple[str, ...]) -> str:
    return "generate" if not labels else "regress" if len(labels) == 1 else "classify"


def _max_length(facts: Manifest) -> int | None:
    training: Any = facts.hyperparameters.get("training")
    found = training.get("max_length") if isinstance(training, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None


def _front(fields: Mapping[str, Any]) -> int:
    """Virtual tokens of a kind's configuration."""
    found = fields.get("num_virtual_tokens")
    return found if isinstance(found, int) else 0


def size_of(adapter: Adapter) -> int:
    """Bytes of its tensors."""
    return sum(p.numel() * p.element_size() for p in adapter.parameters())
