"""The next version, computed from what changed since the last one.

MAJOR: who used the last version cannot use this one as it is: another type, kind, base, placement, set of labels, or
other tensors by name, dtype or shape. MINOR: it behaves otherwise: other tensor bytes, config, method, expression or
requirements. PATCH: it is the same in use, and its tensors digest is equal: card, metrics, licence, lineage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from hub.ref import version_key

if TYPE_CHECKING:
    from hub.manifest import Manifest
    from hub.storage.releases import Catalogue

Level = Literal["major", "minor", "patch"]
FIRST = "1.0.0"  # where there is no version yet
_ORDER: tuple[Level, ...] = ("major", "minor", "patch")


def _base(manifest: Manifest) -> object:
    base = manifest.base
    return None if base is None else (base.arch_digest, base.weights_fingerprint, base.tokenizer_digest)


def _files(*roles: str) -> Callable[[Manifest], object]:
    return lambda manifest: [(entry.path, entry.sha256) for entry in manifest.files if entry.role in roles]


# What each level looks at; whatever differs otherwise is a patch.
_FACTS: dict[Level, dict[str, Callable[[Manifest], Any]]] = {
    "major": {
        "type": lambda manifest: manifest.type,
        "kind": lambda manifest: manifest.kind,
        "base": _base,
        "placement": lambda manifest: sorted(manifest.placement),
        "labels": lambda manifest: manifest.labels,
        "tensor shapes": lambda manifest: sorted((t.name, t.dtype, t.shape) for t in manifest.tensors),
    },
    "minor": {
        "tensors": lambda manifest: manifest.tensors_digest,
        "config": lambda manifest: (manifest.hyperparameters, _files("config")(manifest)),
        "other weights": _files("weights", "extra", "aux", "probes"),
        "method": lambda manifest: manifest.method,
        "expression": lambda manifest: manifest.expression,
        "requirements": lambda manifest: manifest.requires,
        "task": lambda manifest: manifest.task,
        "quantization of the base": lambda manifest: manifest.trained_on and manifest.trained_on.quantization,
    },
}


@dataclass(frozen=True, slots=True)
class Change:
    """What differs between two manifests: the level (None where nothing does), and what calls for it."""

    level: Level | None
    reasons: tuple[str, ...] = ()


def compare(before: Manifest, after: Manifest) -> Change:
    """What the step from one manifest to another amounts to; version, creation time and warnings do not count."""
    for level, facts in _FACTS.items():
        reasons = tuple(name for name, fact in facts.items() if fact(before) != fact(after))
        if reasons:
            return Change(level, reasons)
    old, new = (_comparable(manifest) for manifest in (before, after))
    reasons = tuple(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
    return Change("patch", reasons) if reasons else Change(None)


def _comparable(manifest: Manifest) -> dict[str, Any]:
    return {name: value for name, value in manifest.as_dict().items() if name not in ("version", "created", "warnings")}


def raised(version: str, level: Level) -> str:
    """Version that follows one by a level; a pre-release is followed by its own release.

    Examples
    --------
    >>> raised("1.2.3", "minor"), raised("2.0rc1", "patch"), raised("1.4", "patch")
    ('1.3.0', '2.0.0', '1.4.1')
    """
    parsed = Version(version)
    parts = [*parsed.release, 0, 0][:3] if len(parsed.release) < 3 else list(parsed.release[:3])
    if not parsed.is_prerelease:
        at = _ORDER.index(level)
        parts = [*parts[:at], parts[at] + 1, *[0] * (2 - at)]
    return ".".join(map(str, parts))


def highest(catalogues: Iterable[Catalogue]) -> str | None:
    """Highest version that was ever published, deleted ones too, since none of them is used again."""
    known = list(catalogues)
    versions = [release.version for catalogue in known for release in catalogue.releases]
    versions += [gone.version for catalogue in known for gone in catalogue.tombstones]
    return max(versions, key=version_key, default=None)
