"""What differs between two adapters: config, facts, tensors with the norms of their differences, metrics, files.

Each side is an artifact of the store, or a directory; configs are read as JSON and tensors by numpy, so any kind can be
compared, known here or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.contents.checks import CONFIG, EXTRA, IGNORED, WEIGHTS
from hub.contents.tensor_files import TensorInfo, read_header
from hub.contents.tensor_values import Distance, distance
from hub.errors import NotFound
from hub.io import canonical_json as canonical
from hub.io.files import read_capped, sha256_file, walk
from hub.manifest import MANIFEST_NAME, Manifest, read_manifest

if TYPE_CHECKING:
    from hub.store import Artifact, Store

# Facts of a manifest that differ in any two versions, or are compared as something better.
_APART = {"schema_version", "files", "tensors", "tensors_digest", "created", "metrics", "version", "name", "base"}

Placed = tuple[Path, TensorInfo]


@dataclass(frozen=True)
class Side:
    """One of the two: what it is called, its manifest where it has one, and where each of its files is."""

    label: str
    manifest: Manifest | None
    paths: Mapping[str, Path]
    digests: Mapping[str, str]

    def config(self) -> dict[str, Any]:
        """Fields of its adapter_config.json, nested ones by dotted names; empty where it has none."""
        if CONFIG not in self.paths:
            return {}
        return flat(
            canonical.loads(read_capped(self.paths[CONFIG], canonical.MAX_JSON), what=f"config of {self.label}")
        )

    def facts(self) -> dict[str, Any]:
        """Facts of its manifest by dotted names, the base by what names it."""
        if self.manifest is None:
            return {}
        facts = {name: value for name, value in self.manifest.as_dict().items() if name not in _APART}
        if base := self.manifest.base:
            facts["base"] = {"repo": base.repo, "revision": base.revision, "weights": base.weights_fingerprint}
        return flat(facts)

    def tensors(self) -> dict[str, Placed]:
        """Tensors of its weights and of its whole modules, by name."""
        placed: dict[str, Placed] = {}
        for name in (WEIGHTS, EXTRA):
            if name in self.paths:
                placed |= {info.name: (self.paths[name], info) for info in read_header(self.paths[name]).tensors}
        return placed


@dataclass(frozen=True)
class Change:
    """A tensor that both have: ``distance`` where the shapes agree, dtypes and shapes as they are."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    distance: Distance | None


@dataclass(frozen=True)
class MetricChange:
    """A figure of both, or of one of them (the other is None)."""

    dataset: str
    split: str
    metric: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Diff:
    """All that differs; empty where two adapters are one. Pairs are (of A, of B), None for what is not there."""

    a: str
    b: str
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    same: int = 0
    metrics: tuple[MetricChange, ...] = ()
    files: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing differs."""
        tensors = self.added or self.removed or self.changed
        return not (self.config or self.facts or tensors or self.metrics or self.files)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "changed": [
                asdict(change)
                | ({"relative": d.relative, "cosine": d.cosine} if (d := change.distance) is not None else {})
                for change in self.changed
            ]
        }


def side(text: str, store: Store) -> Side:
    """Find one side: a directory of an adapter (ours or PEFT's), or a ref of the store.

    Raises
    ------
    NotFound
        Neither is there, or the directory holds no adapter.
    """
    directory = Path(text).expanduser()
    if not directory.is_dir():
        return of_artifact(store.get(text))
    paths = {name: directory / name for name in walk(directory, ignore=IGNORED) if name != MANIFEST_NAME}
    has_manifest = (directory / MANIFEST_NAME).exists()
    if not has_manifest and CONFIG not in paths:
        raise NotFound(
            f"{directory} holds no adapter: neither {MANIFEST_NAME} nor {CONFIG}",
            path=directory,
            hint="give an adapter directory, or a ref of the store",
        )
    digests = {name: sha256_file(path)[0] for name, path in paths.items()}
    return Side(text, read_manifest(directory) if has_manifest else None, paths, digests)


def of_artifact(artifact: Artifact) -> Side:
    """Take an artifact of the store as a side; every byte of the files that are compared is checked."""
    entries = artifact.manifest.files
    paths = {e.path: artifact.file(e.path) if e.path in (CONFIG, WEIGHTS, EXTRA) else Path() for e in entries}
    return Side(str(artifact.ref), artifact.manifest, paths, {entry.path: entry.sha256 for entry in entries})


def diff(a: Side, b: Side) -> Diff:
    """Compare two sides; the tensors are read only where their digests or headers say that they may differ."""
    before, after = a.tensors(), b.tensors()
    common = sorted(before.keys() & after.keys())
    changed = [change for name in common if (change := _change(name, before[name], after[name], a, b)) is not None]
    return Diff(
        a=a.label,
        b=b.label,
        config=_pairs(a.config(), b.config()),
        facts=_pairs(a.facts(), b.facts()) if a.manifest and b.manifest else {},
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(changed),
        same=len(common) - len(changed),
        metrics=tuple(_metrics(a.manifest, b.manifest)),
        files=_pairs(
            {name: digest for name, digest in a.digests.items() if name not in (CONFIG, WEIGHTS, EXTRA)},
            {name: digest for name, digest in b.digests.items() if name not in (CONFIG, WEIGHTS, EXTRA)},
        ),
    )


def _change(name: str, a: Placed, b: Placed, left: Side, right: Side) -> Change | None:
    shapes, dtypes = (a[1].shape, b[1].shape), (a[1].dtype, b[1].dtype)
    if shapes[0] != shapes[1]:
        return Change(name, dtypes, shapes, None)
    if dtypes[0] == dtypes[1] and _digest(left, name) is not None and _digest(left, name) == _digest(right, name):
        return None
    norms = distance(a, b)
    return None if norms.difference == 0 and dtypes[0] == dtypes[1] else Change(name, dtypes, shapes, norms)


def _digest(side: Side, name: str) -> str | None:
    if side.manifest is None:
        return None
    return next((entry.sha256 for entry in side.manifest.tensors if entry.name == name), None)


def _metrics(a: Manifest | None, b: Manifest | None) -> Iterator[MetricChange]:
    def table(manifest: Manifest | None) -> dict[tuple[str, str, str], float]:
        return {(m.dataset, m.split, m.metric): m.value for m in (manifest.metrics if manifest else ())}

    before, after = table(a), table(b)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield MetricChange(*key, before.get(key), after.get(key))


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def flat(value: object, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one mapping with dotted names; lists and plain values stay as they are."""
    if not isinstance(value, dict):
        return {prefix: value}
    fields: dict[str, Any] = {}
    for name, inner in value.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        fields |= flat(inner, path) if isinstance(inner, dict) and inner else {path: inner}
    return fields
