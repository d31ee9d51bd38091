"""Files of texts: every row gets its answer or what is wrong with it, and keeps what it had."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hub.errors import UsageError
from hub.io.files import atomic_write
from train.data.cells import CellError, text
from train.data.files import read_rows
from train.fewshot.classifier.asking import ask
from train.fewshot.classifier.classifier import FewShotClassifier
from train.fewshot.examples import Example, no_column

__all__ = ["FileAnswers", "answer", "answer_file", "answer_rows", "ask_file", "written"]

_DIGITS = 6
_SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class FileAnswers:
    """The rows of a file, for each an answer (see `answer`) or ``{"error": ...}``, and how many have an error."""

    rows: Sequence[Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]]
    failed: int


def answer(classifier: FewShotClassifier, scores: Tensor) -> dict[str, Any]:
    """What scores (C,) say: ``label`` and its ``probability``, ``labels``, or ``value``; and all ``probabilities``."""
    if classifier.task == "regression":
        return {"value": round(float(scores[0]), _DIGITS)}
    shares = {name: round(p, _DIGITS) for name, p in zip(classifier.labels, scores.tolist(), strict=True)}
    chosen = classifier.chosen(scores)
    if classifier.task == "multi_label_classification":
        return {"labels": list(chosen), "probabilities": shares}
    return {"label": chosen[0], "probability": shares[chosen[0]], "probabilities": shares}


def answer_rows(
    classifier: FewShotClassifier,
    rows: Sequence[Mapping[str, Any]],
    columns: tuple[str, str | None],
    *,
    source: str = "the rows",
    step: Callable[[int, int], None] = lambda _done, _total: None,
) -> FileAnswers:
    """Answers for rows. One whose text is empty or no text is told so in its place; the others are read.

    `step` is told how many rows are done, and of how many.

    Raises
    ------
    DataError
        No row has a column of that name.
    """
    examples = _examples(rows, columns, source)
    told: list[Mapping[str, Any]] = [{"error": one} if isinstance(one, str) else {} for one in examples]
    there = [i for i, one in enumerate(examples) if not isinstance(one, str)]
    done = len(rows) - len(there)

    def advance(more: int) -> None:
        nonlocal done
        done += more
        step(done, len(rows))

    scores = classifier.scores([one for one in examples if not isinstance(one, str)], advance=advance)
    for i, row in zip(there, scores, strict=True):
        told[i] = answer(classifier, row)
    return FileAnswers(rows, told, len(rows) - len(there))


def _examples(rows: Sequence[Mapping[str, Any]], columns: tuple[str, str | None], source: str) -> list[Example | str]:
    """Each row's text or pair, or what is wrong with it. Raises DataError where no row has a column of that name."""
    names = [name for name in columns if name is not None]
    for name in names:
        if not any(name in row for row in rows):
            raise no_column(name, rows[0], source)
    return [_example(row, names) for row in rows]


def _example(row: Mapping[str, Any], names: Sequence[str]) -> Example | str:
    """A row's text or pair, or what is wrong with it."""
    cells = []
    for name in names:
        if row.get(name) is None:
            return f"{name!r} is empty"
        try:
            cells.append(text(row[name]))
        except CellError as error:
            return f"{name!r} {error}"
        if not cells[-1].strip():
            return f"{name!r} is empty"
    return Example(*cells)


def answer_file(
    classifier: FewShotClassifier,
    data: str,
    columns: tuple[str, str | None] | None = None,
    *,
    out: str | Path | None = None,
    into: str = "prediction",
    probabilities: bool = False,
    step: Callable[[int, int], None] = lambda _done, _total: None,
) -> FileAnswers:
    """Answer every row of a file and, with `out`, write the rows with their answers: CSV, TSV or JSONL by its suffix.

    Parameters
    ----------
    columns
        The file's names for the text and the second one of a pair; default: those of the training rows.
    into
        The column of the answer; beside it stand `INTO_probability`, with `probabilities` those of all labels, and
        where a row could not be read `INTO_error`.

    Raises
    ------
    DataError
        The file cannot be read, or has no such column.
    UsageError
        A suffix that says no format, or a column that is there already; before anything is read.
    """
    place = _place(out)
    rows = read_rows(data)
    taken = next((str(n) for row in rows for n in row if n == into or str(n).startswith(into + "_")), None)
    if place is not None and taken is not None:
        raise UsageError(f"{data} has a column {taken!r} already", hint="--into NAME puts the answer into another one")
    told = answer_rows(classifier, rows, columns or classifier.spec.columns, source=data, step=step)
    if place is not None:
        atomic_write(place, written(told, place.suffix.lower(), into, probabilities=probabilities).encode())
    return told


def ask_file(
    classifier: FewShotClassifier,
    pool: str,
    columns: tuple[str, str | None] | None = None,
    *,
    n: int = 20,
    out: str | Path | None = None,
) -> str:
    """The rows of a file that are worth most to label (see `asking`), as JSON lines; with `out` written there.

    Raises
    ------
    DataError, UsageError
        As `answer_file`.
    """
    place = _place(out)
    rows = read_rows(pool)
    examples = _examples(rows, columns or classifier.spec.columns, pool)
    there = [(i, one) for i, one in enumerate(examples) if not isinstance(one, str)]
    asked = ask(classifier, [one for _, one in there], n)
    told = []
    for one in asked:
        columns_of = _columns(answer(classifier, one.scores), "prediction", False)
        told.append({**rows[there[one.row][0]], **columns_of, "uncertainty": round(one.uncertainty, _DIGITS)})
    if place is not None:
        atomic_write(place, _text(told, place.suffix.lower()).encode())
    return _text(told, ".jsonl")


def _place(out: str | Path | None) -> Path | None:
    """Where to write. Raises UsageError for a suffix that says no format."""
    place = None if out is None else Path(out)
    if place is not None and place.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{place} says no format", path=place, hint="give it the suffix .csv, .tsv or .jsonl")
    return place


def written(told: FileAnswers, suffix: str, into: str, *, probabilities: bool) -> str:
    """The rows with the columns of their answers, as a text of that format."""
    rows = [{**row, **_columns(a, into, probabilities)} for row, a in zip(told.rows, told.answers, strict=True)]
    return _text(rows, suffix)


def _text(rows: Sequence[Mapping[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _columns(answered: Mapping[str, Any], into: str, probabilities: bool) -> dict[str, Any]:
    if "error" in answered:
        return {into: None, f"{into}_error": answered["error"]}
    main = next(answered[name] for name in ("label", "labels", "value") if name in answered)
    columns = {into: main}
    if "probability" in answered:
        columns[f"{into}_probability"] = answered["probability"]
    if probabilities and "probabilities" in answered:
        columns[f"{into}_probabilities"] = answered["probabilities"]
    return columns


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Cells of a row for a table: lists joined by commas, an object as columns of its own."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{key}", one) for key, one in value.items())
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
