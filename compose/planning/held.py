"""How a base is held where nobody says: as the adapters were trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from compose.planning.members import AdapterFinder
from hub.console.output import say
from hub.errors import NotFound
from hub.manifest import Manifest

__all__ = ["held_as", "manifests_of"]


def manifests_of(refs: Iterable[str], finder: AdapterFinder) -> list[Manifest]:
    """Manifests of adapters and of the members of compositions, merges and routers; what has none is passed over.

    Raises
    ------
    NotFound, RefError, IntegrityError
        One that is not there.
    """
    found: dict[str, Manifest | None] = {}
    waiting = [(ref, True) for ref in refs]
    while waiting:
        ref, needed = waiting.pop()
        if ref in found:
            continue
        try:
            manifest = found[ref] = finder.find(ref).manifest
        except NotFound:
            if needed:
                raise
            continue
        if manifest is not None:
            alone = manifest.type == "merge"  # whose members need not be here
            waiting += [(f"{need.name}@{need.digest}", not alone) for need in manifest.requires if need.digest]
    return [manifest for manifest in found.values() if manifest is not None]


def held_as(asked: str | None, manifests: Iterable[Manifest], *, tell: Callable[[str], None] = say) -> str:
    """The quantization asked for, else the one that all adapters were trained on, which is told; else ``none``.

    >>> held_as("int8", [])
    'int8'
    """
    if asked is not None:
        return asked
    trained = {m.trained_on.quantization: m for m in manifests if m.trained_on is not None}
    if trained.keys() <= {"none"}:
        return "none"
    if len(trained) == 1:
        held, manifest = next(iter(trained.items()))
        tell(f"the base is held as {held}, as {manifest.name} was trained on it (--quantize none holds it whole)")
        return held
    ways = " and as ".join(sorted(trained))
    tell(f"the adapters were trained on a base held as {ways}: it is held whole (--quantize NAME chooses)")
    return "none"
