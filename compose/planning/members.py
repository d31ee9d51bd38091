"""The leaves of an expression on disk: artifacts of the store, and adapter directories, ours or PEFT's.

What is asked here is answered from manifests, configs and file headers; no tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compose.planning.plan import Leaf
from compose.planning.unfold import Resolved
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.contents.tensor_files import DTYPES, TensorInfo, read_header
from hub.errors import IntegrityError, NotFound, UsageError
from hub.manifest import MANIFEST_NAME, Manifest, read_manifest
from hub.store import Artifact, Store


@dataclass(frozen=True)
class Held:
    """A leaf that was found: ``facts`` for the plan, and the files of the adapter."""

    text: str
    facts: Resolved
    where: Artifact | Path
    manifest: Manifest | None = None

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
        if isinstance(self.where, Artifact):
            return self.where.file(name) if name in self.where.files else None
        path = self.where / name
        return path if path.exists() else None

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


def read_config(path: Path) -> dict[str, Any]:
    """Fields of an adapter_config.json; IntegrityError if it holds no JSON object."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON: {error}", path=path) from error
    if not isinstance(fields, dict):
        raise IntegrityError(f"{path} holds no JSON object", path=path)
    return fields


class Shelf:
    """Finds leaves by their text: names given by the caller, directories, refs of the store.

    Parameters
    ----------
    store
        Default: the user's own.
    given
        Name in the expression -> directory or ref.
    """

    def __init__(self, store: Store | None = None, given: Mapping[str, str | Path] | None = None) -> None:
        self.store = store or Store()
        self.given = dict(given or {})
        self.held: dict[str, Held] = {}

    def resolve(self, text: str) -> Resolved:
        """What the plan needs to know of a leaf."""
        return self.find(text).facts

    def find(self, text: str) -> Held:
        """The leaf; NotFound, RefError or IntegrityError, which name it, otherwise."""
        if text not in self.held:
            self.held[text] = self._find(text)
        return self.held[text]

    def _find(self, text: str) -> Held:
        source = str(self.given.get(text, text))
        directory = Path(source).expanduser()
        if directory.is_dir() and (text in self.given or looks_like_path(source)):
            return _directory(text, directory)
        if looks_like_path(source):
            raise NotFound(f"there is no directory {source}", ref=text, path=source, hint="check the path")
        artifact = self.store.get(source)
        return Held(text, artifact.manifest, artifact, artifact.manifest)

    def __iter__(self) -> Iterator[Held]:
        return iter(self.held.values())

    def sources(self) -> dict[str, str | Path | Artifact]:
        """All that was found, as ``compose.load(..., adapters=)`` and ``compose.attach`` take it."""
        return {text: held.where for text, held in self.held.items()}


def looks_like_path(text: str) -> bool:
    """Whether a text on the command line means a directory rather than a ref."""
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..") or Path(text, CONFIG).is_file()


def _directory(text: str, directory: Path) -> Held:
    if (directory / MANIFEST_NAME).exists():
        manifest = read_manifest(directory)
        return Held(text, manifest, directory, manifest)
    if not (directory / CONFIG).exists():
        raise NotFound(
            f"{directory} is no adapter directory: it has no {CONFIG}",
            ref=text,
            path=directory,
            hint="give the directory that save_pretrained or compose.save has written",
        )
    from compose.formats.directory import peek

    kind, fields = peek(directory)
    return Held(text, Leaf(kind, hyperparameters={"modules_to_save": fields.get("modules_to_save") or ()}), directory)


def assignments(pairs: tuple[str, ...]) -> dict[str, str | Path]:
    """``NAME=DIR|REF`` of the command line as a mapping; UsageError for anything else."""
    given: dict[str, str | Path] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise UsageError(f"{pair!r} does not say which name stands for what", hint="write --adapter name=DIR|REF")
        if name in given:
            raise UsageError(f"--adapter gives the name {name!r} twice")
        given[name] = source
    return given
