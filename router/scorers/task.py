"""Given-task routing: every row names its adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hub.errors import NotFound, did_you_mean


class TaskScorer:
    """Scores (B, E): 0 for the expert a row names, -inf for the others.

    >>> TaskScorer(["mail", "code"])(["code", "mail"])
    tensor([[-inf, 0.], [0., -inf]])
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self.index = {name: position for position, name in enumerate(experts)}

    def __call__(self, tasks: Sequence[str]) -> Tensor:
        """Score rows by the names they give.

        Raises
        ------
        NotFound
            A name that is no expert; the message gives the row and the nearest names.
        """
        scores = torch.full((len(tasks), len(self.index)), float("-inf"))
        for row, task in enumerate(tasks):
            if task not in self.index:
                near = did_you_mean(task, self.index) or sorted(self.index)
                raise NotFound(f"row {row} asks for {task!r}, which is not an expert", hint=f"did you mean {near[0]}?")
            scores[row, self.index[task]] = 0.0
        return scores
