"""Where adapters come from: refs in a store, directories (ours or PEFT's), adapters in memory; read when needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.formats.directory import read_adapter
from compose.kind.adapter import Adapter
from compose.kind.tensors import PREFIX
from compose.planning.members import AdapterFinder, AdapterSource, StoredAdapter
from compose.planning.plan import Leaf
from compose.planning.unfold import Resolved
from hub.errors import NotFound, UsageError, did_you_mean
from hub.manifest import Manifest
from hub.ref import AdapterRef
from hub.store import Artifact, Store
from router.engine.host import Host
from router.engine.request import POOLINGS

_HEADED = {"classification", "regression"}


@dataclass(frozen=True)
class KnownAdapter:
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
    pooling
        How a text's states become its vector (`pooling` among the manifest's hyperparameters); "" says nothing.
    """

    name: str
    source: Artifact | Path | Adapter
    facts: Resolved
    labels: tuple[str, ...]
    task: str
    max_length: int | None
    front: int
    bytes: int
    pooling: str = ""

    def read(self, host: Host) -> Adapter:
        """Read and check its tensors and make the adapter, frozen; nothing on the base changes."""
        if isinstance(self.source, Adapter):
            return self.source
        view, sites = host.heads.view(len(self.labels) or None, host.runtime.sites)
        adapter = read_adapter(self.source, sites, view, name=self.name)
        adapter.labels = self.labels
        return adapter


class Sources:
    """All adapters that can be named: those given by name, and those of the store.

    Attributes
    ----------
    store
        Where refs are looked up.
    pins
        Text of a ref -> digest: what each ref stands for; refs found in it are read so (see `hub run`'s journal).
    pinned
        Whether a ref stands for what it stood for when it was first asked for, whatever is published since: one run of
        one file. Otherwise it is looked up anew whenever the store has changed.
    """

    def __init__(self, host: Host, store: Store, given: Mapping[str, AdapterSource] | None = None) -> None:
        self._host, self.store = host, store
        self._finder = AdapterFinder(
            store, given, fetch=self._pinned, paths=False
        )  # a request must not read our directories
        self._offers = Counter(list(self._finder.given))  # the second directory of a name is another resident
        self._known: dict[str, KnownAdapter] = {}
        self._named: dict[str, KnownAdapter] = {}
        self.pins: dict[str, str] = {}
        self.pinned = False
        self._head = store.ledger.size

    def follow(self) -> bool:
        """Look refs up anew from now on if the store has changed since the last call; whether it has."""
        head = self._head if self.pinned else self.store.ledger.size  # append-only: it has grown or is as it was
        if head == self._head:
            return False
        self._head = head
        self.pins.clear()
        self._known = {text: k for text, k in self._known.items() if not isinstance(k.source, Artifact)}
        return True

    def offer(self, name: str, source: AdapterSource) -> None:
        """Make a source known under a name of its own."""
        self._finder.given[name] = source
        self._offers[name] += 1
        self._known.pop(name, None)

    def withdraw(self, name: str) -> bool:
        """Forget a name that was offered; whether it was."""
        self._known.pop(name, None)
        return self._finder.given.pop(name, None) is not None

    def given_source(self, name: str) -> AdapterSource | None:
        """What a name was offered for."""
        return self._finder.given.get(name)

    def root(self, name: str) -> str:
        """Where an offered adapter comes from, for people."""
        source = self._finder.given[name]
        return name if isinstance(source, Adapter) else str(getattr(source, "ref", source))

    @property
    def given(self) -> tuple[str, ...]:
        """Names that were offered."""
        return tuple(self._finder.given)

    def known(self, text: str) -> KnownAdapter:
        """The adapter that a name or ref stands for. Raises NotFound with the nearest names."""
        if text not in self._known:
            known = self._look(text, self._source(text))
            self._known[text] = self._named[known.name] = known
        return self._known[text]

    def named(self, name: str) -> KnownAdapter:
        """The adapter of a resident's name, which :meth:`known` has given before."""
        return self._named[name]

    def artifact(self, text: str) -> Artifact | None:
        """The store's artifact that a ref, or a name offered for one, stands for; None for other adapters."""
        source = self._source(text)
        return source if isinstance(source, Artifact) else None

    def _source(self, text: str) -> Adapter | Artifact | Path:
        if text not in self._finder.given and self._in_memory(text):
            return self._host.runtime.adapters[text]
        return self._finder.source(text)

    def _in_memory(self, text: str) -> bool:
        """Whether somebody else has put it on the base, and not a reading of ours that was withdrawn since."""
        read = self._named.get(text)
        return text in self._host.runtime.adapters and (read is None or isinstance(read.source, Adapter))

    def _pinned(self, text: str) -> Artifact:
        """The artifact that a ref has stood for since it was first asked for."""
        ref = AdapterRef.parse(text)
        if text in self.pins:
            return self.store.get(AdapterRef.parse(ref.id).at(digest=self.pins[text]))
        try:
            artifact = self.store.get(ref)
        except NotFound as error:
            near = did_you_mean(text, self.given)
            if near and (error.hint is None or "did you mean" not in error.hint):
                raise NotFound(error.message, ref=text, hint=f"did you mean {' or '.join(near)}?") from error
            raise
        self.pins[text] = artifact.digest
        return artifact

    def _look(self, text: str, source: Adapter | Artifact | Path) -> KnownAdapter:
        if not isinstance(source, Artifact | Path):
            front, task = _front(vars(source.config)), "classify" if source.labels else "generate"
            return KnownAdapter(text, source, Leaf.of(source), source.labels, task, None, front, size_of(source))
        stored = StoredAdapter.of(text, source)
        manifest = stored.manifest
        self._refuse_own_vocabulary(stored)
        labels = self._classes(stored, ()) if manifest is None else self._labels(stored, manifest)
        task = "regress" if manifest is not None and manifest.task == "regression" else _task_of(labels)
        return KnownAdapter(
            name=stored.ref if isinstance(source, Artifact) else self._resident_name(text),
            source=source,
            facts=manifest or Leaf(stored.facts.kind, labels=labels, hyperparameters=stored.facts.hyperparameters),
            labels=labels,
            task=task,
            max_length=None if manifest is None else _max_length(manifest),
            front=_front(stored.config),
            bytes=source.facts.size if isinstance(source, Artifact) else stored.size,
            pooling="" if manifest is None else _pooling(manifest),
        )

    def _refuse_own_vocabulary(self, stored: StoredAdapter) -> None:
        table = self._host.runtime.sites.input_table
        own = None if table is None else stored.tensors.get(f"{PREFIX}{table.path}.weight")
        if table is not None and own is not None and own.shape[0] != table.in_features:
            raise UsageError(
                f"{stored.ref} has a vocabulary of its own, of {own.shape[0]} tokens, and rows of one batch share the "
                f"base's {table.in_features}",
                ref=stored.ref,
                hint="compose.load(base, adapter) runs it alone",
            )

    def _resident_name(self, text: str) -> str:
        return text if self._offers[text] < 2 else f"{text}#{self._offers[text]}"

    def _labels(self, stored: StoredAdapter, manifest: Manifest) -> tuple[str, ...]:
        """Classes of the head of an adapter that was made for a task with one."""
        if manifest.task not in _HEADED:
            return ()
        if self._host.translates:
            raise UsageError(
                f"{stored.ref} is a head for {manifest.task}, and {self._host.name} is an encoder-decoder",
                ref=stored.ref,
                hint="compose.load(base, task='classification') runs it",
            )
        return self._classes(stored, manifest.labels)

    def _classes(self, stored: StoredAdapter, named: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the classes: the given ones, or as many numbers as the head tells apart."""
        count = self._host.heads.classes({name: info.shape for name, info in stored.tensors.items()})
        if count is None:
            return ()
        return tuple(named) if len(named) == count else tuple(f"LABEL_{i}" for i in range(count))


def _task_of(labels: tuple[str, ...]) -> str:
    return "generate" if not labels else "regress" if len(labels) == 1 else "classify"


def _max_length(facts: Manifest) -> int | None:
    training: Any = facts.hyperparameters.get("training")
    length = training.get("max_length") if isinstance(training, Mapping) else None
    return length if isinstance(length, int) and length > 0 else None


def _pooling(facts: Manifest) -> str:
    asked = facts.hyperparameters.get("pooling", "")
    return asked if isinstance(asked, str) and asked in POOLINGS[1:] else ""


def _front(fields: Mapping[str, Any]) -> int:
    """Virtual tokens of a kind's configuration."""
    count = fields.get("num_virtual_tokens")
    return count if isinstance(count, int) else 0


def size_of(adapter: Adapter) -> int:
    """Bytes of its tensors."""
    return sum(p.numel() * p.element_size() for p in adapter.parameters())
