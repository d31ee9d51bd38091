"""What a merge lost when its result was written with a limited rank: measured, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SiteLoss:
    """At one site: the rank kept, ||D||^2 of the exact merge, and ||D - B A||^2 of what was written."""

    rank: int
    energy: float
    discarded: float

    @property
    def share(self) -> float:
        """Discarded part of the energy, 0 to 1."""
        return min(1.0, self.discarded / self.energy) if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Certificate:
    """Losses by site; no sites means that the merge is exact."""

    sites: Mapping[str, SiteLoss] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Discarded part of the energy over all sites."""
        total = sum(s.energy for s in self.sites.values())
        return min(1.0, sum(s.discarded for s in self.sites.values()) / total) if total > 0 else 0.0

    @property
    def exact(self) -> bool:
        """Whether nothing was left out (up to rounding)."""
        return all(s.discarded == 0 for s in self.sites.values())

    @property
    def worst(self) -> tuple[str, float]:
        """Site with the largest discarded share, and that share."""
        if not self.sites:
            return "", 0.0
        return max(((path, s.share) for path, s in self.sites.items()), key=lambda pair: pair[1])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: overall and per site."""
        rows = {p: {"rank": s.rank, "energy": s.energy, "discarded": s.share} for p, s in sorted(self.sites.items())}
        return {"exact": self.exact, "discarded": self.share, "sites": rows}

    def __str__(self) -> str:
        if self.exact:
            return "exact"
        path, share = self.worst
        return f"{100 * self.share:.2g}% of the energy left out, {100 * share:.2g}% at {path}"
