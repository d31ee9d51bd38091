"""The leaves of an expression: adapters in memory, artifacts of the store, and directories, ours or PEFT's.

What is asked here is answered from manifests, configs and file headers; no tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from compose.formats.files import file_of, has, peek, read_config
from compose.planning.plan import Leaf
from compose.planning.unfold import Resolved
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.contents.tensor_files import DTYPES, TensorInfo, read_header
from hub.errors import NotFound, UsageError
from hub.manifest import MANIFEST_NAME, Manifest, read_manifest
from hub.store import Artifact, Store

if TYPE_CHECKING:  # what adapters on disk say of themselves needs no torch
    from compose.kind.adapter import Adapter

AdapterSource: TypeAlias = "Adapter | Artifact | str | Path"


@dataclass(frozen=True)
class StoredAdapter:
    """A leaf on disk: ``facts`` for the plan, and the files of the adapter."""

    text: str
    facts: Resolved
    where: Artifact | Path
    manifest: Manifest | None = None

    @classmethod
    def of(cls, text: str, where: Artifact | Path) -> StoredAdapter:
        """The adapter of an artifact or a directory; a manifest says what it is, else its config.

        Raises
        ------
        NotFound, IntegrityError, KindError
            The directory holds no adapter, or one that no kind reads.
        """
        if (manifest := manifest_of(where)) is not None:
            return cls(text, manifest, where, manifest)
        kind, fields = peek(Path(str(where)))
        return cls(text, Leaf(kind, hyperparameters={"modules_to_save": fields.get("modules_to_save") or ()}), where)

    @property
    def ref(self) -> str:
        """``ns/name@version`` of an artifact, the path of a directory."""
        return str(self.where.ref) if isinstance(self.where, Artifact) else str(self.where)

    @property
    def digest(self) -> str | None:
        """Digest of an artifact; None for a directory that was never published."""
        return self.where.digest if isinstance(self.where, Artifact) else None

    def file(self, name: str) -> Path | None:
        """Path of a file of the adapter, checked if it is in the store; None if there is none."""
        return file_of(self.where, name) if has(self.where, name) else None

    def need(self, name: str) -> Path:
        """Path of a file; NotFound where there is none."""
        path = self.file(name)
        if path is None:
            hint = "pickles such as adapter_model.bin are never read: save it again as safetensors"
            raise NotFound(f"{self.text} has no {name}", ref=self.text, path=name, hint=hint)
        return path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Fields of adapter_config.json."""
        return read_config(self.need(CONFIG))

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes of the weights and, where there is one, the extra file, from their headers."""
        files = [self.need(WEIGHTS), self.file(EXTRA)]
        return {info.name: info for path in files if path is not None for info in read_header(path.resolve()).tensors}

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(_count(info) for info in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(_count(info) * DTYPES[info.dtype].size for info in self.tensors.values())


def _count(info: TensorInfo) -> int:
    return math.prod(info.shape)


def manifest_of(where: Artifact | Path) -> Manifest | None:
    """Manifest of an artifact, or of a directory that was packed; None for any other directory."""
    if isinstance(where, Artifact):
        return where.manifest
    return read_manifest(where) if (where / MANIFEST_NAME).exists() else None


def task_of(leaves: Iterable[Resolved], labels: Sequence[str] | None) -> tuple[str | None, Sequence[str] | None]:
    """Task and labels that the adapters were trained for, if their manifests agree on one."""
    manifests = [leaf for leaf in leaves if isinstance(leaf, Manifest) and leaf.head_task]
    tasks = {m.head_task for m in manifests}
    if len(tasks) != 1:
        return None, labels
    known = {m.labels for m in manifests if m.labels}
    return tasks.pop(), labels or (known.pop() if len(known) == 1 else None)


class AdapterFinder:
    """Finds leaves by their text: names given by the caller, directories, refs of the store.

    Parameters
    ----------
    store
        Default: the user's own.
    given
        Name in the expression -> an adapter in memory, an artifact, a directory or a ref.
    fetch
        From a ref to its artifact; default: what the store has.
    paths
        Whether a text that nobody gave may name a directory: not where texts come from the network.
    """

    def __init__(
        self,
        store: Store | None = None,
        given: Mapping[str, AdapterSource] | None = None,
        *,
        fetch: Callable[[str], Artifact] | None = None,
        paths: bool = True,
    ) -> None:
        self._store, self._fetch, self._paths = store, fetch, paths
        self.given: dict[str, AdapterSource] = dict(given or {})
        self._stored: dict[str, StoredAdapter] = {}

    @cached_property
    def store(self) -> Store:
        """Where refs are looked up."""
        return self._store or Store()

    def source(self, text: str) -> Adapter | Artifact | Path:
        """What a leaf stands for.

        Raises
        ------
        NotFound, RefError
            No such directory or ref; nobody gave that name.
        """
        if text in self._stored:
            return self._stored[text].where
        source = self.given.get(text, text)
        if not isinstance(source, str | Path):
            return source
        named, directory = str(source), Path(source).expanduser()
        path_like = (self._paths or text in self.given) and looks_like_path(named)
        if directory.is_dir() and (text in self.given or path_like):
            return directory
        if path_like:
            raise NotFound(f"there is no directory {named}", ref=text, path=named, hint="check the path")
        return self._fetch(named) if self._fetch else self.store.get(named)

    def resolve(self, text: str) -> Resolved:
        """What the plan needs to know of a leaf."""
        source = self.given.get(text)
        return self.find(text).facts if source is None or isinstance(source, Artifact | str | Path) else Leaf.of(source)

    def find(self, text: str) -> StoredAdapter:
        """The leaf, of which there are files; NotFound, RefError or IntegrityError, which name it, otherwise."""
        if text not in self._stored:
            source = self.source(text)
            if not isinstance(source, Artifact | Path):
                raise UsageError(f"adapter {text!r} is in memory and has no files", hint="compose.save writes them")
            self._stored[text] = StoredAdapter.of(text, source)
        return self._stored[text]

    def __iter__(self) -> Iterator[StoredAdapter]:
        return iter(self._stored.values())

    def sources(self) -> dict[str, str | Path | Artifact]:
        """All that was found, as ``compose.load(..., adapters=)`` and ``compose.attach`` take it."""
        return {text: stored.where for text, stored in self._stored.items()}


def looks_like_path(text: str) -> bool:
    """Whether a text on the command line means a directory rather than a ref."""
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..") or Path(text, CONFIG).is_file()


def assignments(pairs: tuple[str, ...], option: str = "--adapter", value: str = "DIR|REF") -> dict[str, str | Path]:
    """``NAME=DIR|REF`` of an option of the command line as a mapping; UsageError for anything else."""
    given: dict[str, str | Path] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise UsageError(f"{pair!r} does not say which name stands for what", hint=f"write {option} name={value}")
        if name in given:
            raise UsageError(f"{option} gives the name {name!r} twice")
        given[name] = source
    return given
