"""What a run did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitResult"]


@dataclass
class FitResult:
    """What a run did: `history` has a record for each logged step and each evaluation."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None  # {"step": ..., "loss": ..., ...} of the best evaluation
    steps: int = 0
    total_steps: int = 0
    items: int = 0  # predicted tokens or labelled rows that were learned from
    seconds: float = 0.0
    stopped: str = "finished"  # or "patience", "time", "non-finite"
    waited: int = 0  # evaluations since the best one
