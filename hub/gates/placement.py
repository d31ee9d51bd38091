"""Whether every tensor of an adapter has its place on the base that it says it is for."""

from collections.abc import Iterable
from pathlib import Path

from hub.gate import GATES, Gate
from hub.lazy import load
from hub.manifest import Manifest


@GATES.register("placement")
class Placement(Gate):
    """Tries the adapter on the shapes of its base; `compose`, which knows models, does it."""

    needs_base = True

    def check(self, directory: Path, manifest: Manifest) -> Iterable[str]:
        """Raise GateError for a kind, a field or a tensor that the base has no place for, by name."""
        warnings: Iterable[str] = load("compose.artifacts.placement_gate:gate")(directory, manifest)
        return warnings
