"""Texts with answers for what reads texts, and how well it does: measures of a reader's scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import make_config
from train.data.cells import CellError, class_name, label_set, number
from train.data.datasets import read_rows, values_of
from train.errors import DataError
from train.steps.evaluate import measures

__all__ = ["ReadsTexts", "TextPairs", "answers_of", "labelled_texts", "measure_scores"]

TextPairs: TypeAlias = list[tuple[str, "str | None"]]


class ReadsTexts(Protocol):
    """What `compose.reader.Reader` and a few-shot classifier have in common."""

    @property
    def task(self) -> str:
        """``classification``, ``multi_label_classification`` or ``regression``."""

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the scores."""

    def chosen(self, scores: Tensor) -> tuple[str, ...]:
        """The labels that scores (C,) stand for."""


def labelled_texts(
    reader: ReadsTexts,
    data: str,
    columns: Mapping[str, str],
    *,
    named: tuple[str, str | None] = ("text", None),
    separator: str | None = None,
) -> tuple[TextPairs, Tensor, str]:
    """Texts of a file (pairs where `named` has a second column), their answers (see `answers_of`), and a digest.

    `columns` are the file's names for text, text_pair and label where they are not `named`, those of training.

    Raises
    ------
    DataError, ConfigError
        A column that is not there, a label that is none of the reader's; with the row.
    """
    rows = read_rows(data, part="test")
    own = {"text": named[0]} | ({"text_pair": named[1]} if named[1] is not None else {})
    present = {str(key) for row in rows[:1] for key in row}
    own = {role: name for role, name in own.items() if name in present}  # a file for `hub eval` calls them as it does
    config = make_config({"task": "classification", "columns": {**own, **columns}})
    texts = values_of(rows, config, data, "text")
    pairs = [None] * len(texts) if named[1] is None else values_of(rows, config, data, "text_pair")
    label = config.columns.get("label", "label")
    missing = next((i for i, row in enumerate(rows, 1) if row.get(label) is None), None)
    if missing is not None:
        there = ", ".join(sorted(map(str, rows[missing - 1])))
        raise DataError(
            f"{data}, row {missing}: no column {label!r}; it has: {there}", hint="name it: --column label=..."
        )
    answers = answers_of(reader.task, reader.labels, [row[label] for row in rows], separator=separator, source=data)
    told = json.dumps([texts, pairs, [str(row[label]) for row in rows]], ensure_ascii=False)
    return list(zip(texts, pairs, strict=True)), answers, "sha256:" + hashlib.sha256(told.encode()).hexdigest()


def answers_of(
    task: str, labels: Sequence[str], values: Sequence[Any], *, separator: str | None = None, source: str = "the data"
) -> Tensor:
    """(N,) class numbers; of ``multi_label_classification`` (N, C) of 0 and 1; of ``regression`` (N,) numbers.

    Raises
    ------
    DataError
        A value that is none of these, or a label that is not among `labels`; with the row.
    """
    if task == "regression":
        return torch.tensor([_read(number, value, source, row) for row, value in enumerate(values, 1)])

    def names_in(value: Any) -> tuple[str, ...]:
        return label_set(value, separator) if task == "multi_label_classification" else (class_name(value),)

    index = {label: i for i, label in enumerate(labels)}
    table = torch.zeros(len(values), len(labels), dtype=torch.long)
    for row, value in enumerate(values, 1):
        for name in _read(names_in, value, source, row):
            if name not in index:
                raise DataError(
                    f"{source}, row {row}: labels unseen in training: {name}", hint="labels: " + ", ".join(labels[:20])
                )
            table[row - 1, index[name]] = 1
    return table if task == "multi_label_classification" else table.argmax(1)


def _read(cell: Callable[[Any], Any], value: Any, source: str, row: int) -> Any:
    try:
        return cell(value)
    except CellError as error:
        raise DataError(f"{source}, row {row}: the label {error}", hint=error.hint) from error


def measure_scores(reader: ReadsTexts, scores: Tensor, answers: Tensor) -> dict[str, float]:
    """Measures of scores (N, C) as `compose.reader.Reader.scores` gives them; `loss` is in nats a row, or squared."""
    if reader.task == "regression":
        loss = float(F.mse_loss(scores[:, 0].double(), answers.double()))
        return {"loss": loss, **measures(reader.task, scores, answers)}
    if reader.task == "multi_label_classification":
        loss = float(F.binary_cross_entropy(scores.double(), answers.double()))
        said = [set(reader.chosen(row)) for row in scores]
        sign = torch.tensor([[1.0 if label in own else -1.0 for label in reader.labels] for own in said])
        return {"loss": loss, **measures(reader.task, sign, answers)}
    log_p = scores.double().clamp_min(1e-30).log()
    return {"loss": float(F.nll_loss(log_p, answers)), **measures(reader.task, log_p, answers)}
