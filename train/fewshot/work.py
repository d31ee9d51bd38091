"""What learning costs, counted and not timed: one seed and budget give the same steps on an idle and a busy machine.

A token that passes a block costs two floating-point operations a parameter, a step of training three times as much in
the blocks that train, and a nominal speed makes seconds of that:

    seconds = 2 tokens sum_{trained or passed blocks} parameters / speed,    speed as one core of this kind has it

A machine twice as slow takes twice the budget; the classifier stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from train.fewshot.reading.replay import blocks_of

__all__ = ["Work"]

SPEED = {"fp32": 5e10, "bf16": 1.5e11, "cuda": 2e13}  # operations a second: a core, one with native bf16, a GPU
_STEP = 0.03  # seconds of a step that do not depend on its rows
_BACKWARD = 3
_WIDTH = 384  # of a state, about
_FIT = 0.05  # seconds of fitting a head, however few the rows


@dataclass
class Work:
    """A budget of seconds, and what was charged to it.

    Attributes
    ----------
    decided
        What was decided because of the budget, for the report and the manifest: steps, rows, folds.
    sizes
        Parameters of each block of the bare base.
    """

    model: nn.Module
    budget: float
    speed: float
    spent: float = 0.0
    decided: dict[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        blocks = blocks_of(self.model)
        parts = [self.model] if blocks is None else list(blocks)
        self.sizes = tuple(sum(p.numel() for p in part.parameters()) for part in parts)

    @classmethod
    def of(cls, model: nn.Module, budget: float, precision: str) -> Work:
        """A fresh budget for a model."""
        device = next(model.parameters()).device.type
        return cls(model, budget, SPEED["cuda" if device == "cuda" else precision])

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - self.spent

    def charge(self, seconds: float) -> float:
        """Take seconds off the budget; returns them."""
        self.spent += seconds
        return seconds

    def reading(self, tokens: float) -> float:
        """Seconds of one pass of `tokens` through the base."""
        return 2 * tokens * sum(self.sizes) / self.speed

    def step(self, tokens: float, trained: int) -> float:
        """Seconds of a step of training on a batch of `tokens`: the last `trained` blocks, those below are replayed."""
        return _STEP + _BACKWARD * 2 * tokens * sum(self.sizes[-trained:]) / self.speed

    def fitting(self, rows: int, classes: int, views: int = 1) -> float:
        """Seconds of fitting the heads of all penalties on `rows` rows: some 600 passes over what spans them."""
        spanned = min(rows, _WIDTH * views, 512)
        return 600 * 4 * rows * spanned * classes / SPEED["fp32"] + _FIT

    def steps(self, wanted: int, each: float, share: float = 1.0, *, name: str, least: int = 1) -> int:
        """How many of the `wanted` steps fit into a share of what is left, `least` at least; charged and recorded."""
        count = max(least, min(wanted, int(share * max(self.left, 0.0) / each)))
        self.charge(count * each)
        self.decided[name] = count
        return count
