"""Encoded rows held as flat tensors, the batches cut from them, and the order in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from train.seeds import generator

__all__ = ["IGNORE", "Dataset", "Ragged", "epoch_order"]

IGNORE = -100  # the label of a token that is not learned (torch's cross_entropy skips it)
_WINDOW = 16  # optimizer steps whose rows are sorted together when grouping by length


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal length in one tensor: row i is `values[starts[i]:starts[i + 1]]`."""

    values: Tensor  # (total,)
    starts: Tensor  # (N + 1,) int64

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Pack lists of integers."""
        starts = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor([len(row) for row in rows], dtype=torch.int64), 0, out=starts[1:])
        return cls(torch.tensor([token for row in rows for token in row], dtype=torch.int32), starts)

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) tokens of each row."""
        return self.starts[1:] - self.starts[:-1]

    def row(self, index: int) -> Tensor:
        """One sequence."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    def select(self, rows: Tensor) -> Ragged:
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        within = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)
        return Ragged(self.values[self.starts[rows].repeat_interleave(lengths) + within], starts)

    def pad(self, rows: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """(B, T) int64 with the short rows filled on the right, and the (B, T) bool of what is real."""
        lengths = self.lengths[rows]
        column = torch.arange(int(lengths.max()))
        real = column < lengths[:, None]
        index = (self.starts[rows][:, None] + column).clamp_(max=len(self.values) - 1)
        return self.values[index].long().masked_fill_(~real, fill), real


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows ready for a model.

    `columns` maps a model's argument to a `Ragged` (a value per token) or to a tensor with a value per row.
    Without a `labels` column every token is learned. `pad_id` fills `input_ids`.
    """

    columns: Mapping[str, Ragged | Tensor]
    task: str
    pad_id: int = 0
    labels: tuple[str, ...] = ()  # names of the classes, by index
    source: str = ""  # where the rows came from, for messages
    origin: Tensor | None = None  # (N,) each row's number in its source, where that is not its index

    def __len__(self) -> int:
        return len(self.tokens.starts) - 1

    @property
    def tokens(self) -> Ragged:
        """The `input_ids`."""
        column = self.columns["input_ids"]
        assert isinstance(column, Ragged)  # noqa: S101 (every encoder makes it so)
        return column

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each row."""
        return self.tokens.lengths

    @cached_property
    def items(self) -> Tensor:
        """(N,) how many terms each row adds to the loss: predicted tokens, or 1 for a row with one label."""
        labels = self.columns.get("labels")
        if isinstance(labels, Tensor):
            if self.task == "regression":  # every number is one
                return torch.ones(len(self), dtype=torch.int64)
            return (labels != IGNORE).long() if labels.dim() == 1 else torch.ones(len(self), dtype=torch.int64)
        if labels is None:
            return (self.lengths - 1).clamp_(min=0)
        learned = torch.cat([torch.zeros(1, dtype=torch.int64), (labels.values != IGNORE).long().cumsum(0)])
        count = learned[labels.starts[1:]] - learned[labels.starts[:-1]]
        if self.task == "causal_lm":  # the first token has no position that predicts it
            count = count - (labels.values[labels.starts[:-1].clamp(max=len(labels.values) - 1)] != IGNORE).long()
        return count

    @cached_property
    def digest(self) -> str:
        """`sha256:...` of the encoded rows: what a checkpoint compares before it resumes."""
        digest = hashlib.sha256(repr((self.task, self.pad_id, self.labels)).encode())
        for name in sorted(self.columns):
            column = self.columns[name]
            parts = (column.values, column.starts) if isinstance(column, Ragged) else (column,)
            for part in parts:
                digest.update(f"{name}|{part.dtype}|{tuple(part.shape)}|".encode())
                digest.update(part.contiguous().numpy().tobytes())
        return "sha256:" + digest.hexdigest()

    def select(self, rows: Tensor) -> Dataset:
        """The given rows as a dataset of their own."""
        columns = {n: c.select(rows) if isinstance(c, Ragged) else c[rows] for n, c in self.columns.items()}
        origin = rows if self.origin is None else self.origin[rows]
        return Dataset(columns, self.task, self.pad_id, self.labels, self.source, origin)

    def where(self, rows: Tensor, most: int = 8) -> str:
        """Name rows for a message: `rows 3, 17, ... of train.jsonl`, counted from 1 in their source."""
        numbers = (rows if self.origin is None else self.origin[rows]).tolist()
        shown = ", ".join(str(number + 1) for number in numbers[:most]) + (", ..." if len(numbers) > most else "")
        return f"{'row' if len(numbers) == 1 else 'rows'} {shown} of {self.source or 'the data'}"

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The model's arguments: `input_ids` and `attention_mask` (B, T), `labels` (B, T) or (B,), ..."""
        ids, real = self.tokens.pad(rows, self.pad_id)
        batch = {"input_ids": ids}
        if "position_ids" not in self.columns:  # which tell packed rows apart, where there is no mask
            batch["attention_mask"] = real.long()
        for name, column in self.columns.items():
            if isinstance(column, Tensor):
                batch[name] = column[rows]
            elif name != "input_ids":
                batch[name] = column.pad(rows, IGNORE if name == "labels" else 0)[0]
        if "labels" not in batch:
            batch["labels"] = ids.masked_fill(~real, IGNORE)
        return batch

    def batches(self, size: int, *, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Row numbers and batch, over all rows or every `parts`-th batch; longest first, so that pads are few."""
        order = torch.argsort(self.lengths, descending=True, stable=True)
        for index, start in enumerate(range(0, len(order), size)):
            if index % parts == part:
                rows = order[start : start + size]
                yield rows, self.batch(rows)


def epoch_order(data: Dataset, seed: int, epoch: int, step_rows: int, *, group_by_length: bool = False) -> Tensor:
    """(N,) the row order of one epoch: a function of seed and epoch alone.

    With `group_by_length` the shuffled rows are sorted by length inside windows of 16 steps and the steps are
    shuffled again: the rows of a step are alike, the steps are not.
    """
    random = generator(seed, "data", epoch)
    order = torch.randperm(len(data), generator=random)
    if not group_by_length:
        return order
    windows = torch.split(order, step_rows * _WINDOW)
    order = torch.cat([w[torch.argsort(data.lengths[w], descending=True, stable=True)] for w in windows])
    steps = torch.split(order, step_rows)
    whole = len(steps) - (len(order) % step_rows > 0)  # a last, smaller step stays last: steps then keep their size
    turn = torch.randperm(whole, generator=random).tolist()
    return torch.cat([steps[i] for i in [*turn, *range(whole, len(steps))]])
