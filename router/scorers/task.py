"""Given-task routing: every row names its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hub.errors import NotFound, UsageError, did_you_mean
from router.bench import Batch, Experts
from router.scorer import RowScorer, Statistics, register


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


@register("task")
class Task(RowScorer):
    """`score_e = 0` for the expert that the row names, -inf for the others: the oracle, and multi-tenant serving."""

    needs_data = False
    reads_tasks = True

    def score(
        self, model: PreTrainedModel, batch: Batch, experts: Experts, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """Scores (B, E) by the names the rows give."""
        if len(batch.tasks) != len(batch):
            raise UsageError(
                "these rows do not say which expert they ask for", hint="give a name a row, or another method"
            )
        return TaskScorer(list(experts))(batch.tasks).to(batch.input_ids.device)
