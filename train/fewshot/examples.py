"""Labelled texts, and what is wrong with them before anything is trained."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hub.errors import did_you_mean
from train.data.cells import CellError, class_name, in_order, text
from train.errors import DataError

__all__ = [
    "Columns",
    "Example",
    "Text",
    "check_texts",
    "count_cut",
    "label_names",
    "no_column",
    "to_examples",
    "warn_of_duplicates",
    "without_contradictions",
]

log = logging.getLogger(__name__)
_LIKE = 'predict(["a text", ...]), predict([("one", "two")]), predict([{"text": "one", "text2": "two"}])'
_MOST_LABELS = 999  # a thousand classes are more likely a column of free text or of ids


@dataclass(frozen=True)
class Example:
    """One row: a text or a pair, and its label where that is known."""

    text: str
    text2: str | None = None
    label: str | None = None

    @classmethod
    def of(cls, text: Text, columns: tuple[str, str | None] = ("text", None)) -> Example:
        """A text, a pair, or a row by its columns, as an example without a label; an example as it is.

        Raises
        ------
        DataError
            Something else.
        """
        if isinstance(text, Example):
            return text
        if isinstance(text, Mapping):
            wanted = [name for name in columns if name is not None]
            if missing := [name for name in wanted if name not in text]:
                raise no_column(missing[0], text, "a row")
            parts = tuple(text[name] for name in wanted)
        else:
            parts = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, list | tuple) else ()
            parts = parts[:1] if parts[1:] == (None,) else parts
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise DataError(f"{text!r:.60} is neither a text nor a pair of texts", hint=_LIKE)
        return cls(*parts)

    @property
    def key(self) -> tuple[str, str]:
        """What makes two rows the same: the texts without case and spacing."""
        return " ".join(self.text.lower().split()), " ".join((self.text2 or "").lower().split())


Text: TypeAlias = "str | tuple[str, str | None] | Mapping[str, Any] | Example"


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a file."""

    text: str = "text"
    text2: str | None = None
    label: str = "label"


def to_examples(
    rows: Iterable[Mapping[str, Any]], columns: Columns, *, source: str, labelled: bool = True
) -> list[Example]:
    """Rows of a file as examples.

    Raises
    ------
    DataError
        A column is missing (with the nearest one that is there), a text is empty or none, a label is none.
    """
    wanted = [(name, text) for name in (columns.text, columns.text2) if name]
    wanted += [(columns.label, class_name)] if labelled else []
    examples = []
    for number, row in enumerate(rows, 1):
        cells = []
        for name, read in wanted:
            if row.get(name) is None:
                raise no_column(name, row, f"{source}, row {number}")
            try:
                cells.append(read(row[name]))
            except CellError as error:
                raise DataError(f"{source}, row {number}: {name!r} {error}", hint=error.hint) from error
        label = cells.pop() if labelled else None
        examples.append(Example(cells[0], cells[1] if columns.text2 else None, label))
    _refuse_empty(examples, source)
    return examples


def no_column(name: str, row: Mapping[str, Any], where: str) -> DataError:
    """What is wrong with a row that lacks a column: the nearest one, and those that are there."""
    near = did_you_mean(name, [str(key) for key in row], count=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    present = ", ".join(sorted(str(key) for key in row)) or "none"
    what = f"column {name!r} is empty" if name in row else f"no column {name!r}; it has: {present}"
    return DataError(f"{where}: {what}", hint=f"{hint}name columns with --text, --text2 and --label")


def _refuse_empty(examples: Sequence[Example], source: str) -> None:
    empty = [
        i for i, e in enumerate(examples, 1) if not e.text.strip() or (e.text2 is not None and not e.text2.strip())
    ]
    if empty:
        shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        raise DataError(f"{source}: {len(empty)} empty texts (rows {shown})", hint="remove these rows")


def check_texts(examples: Sequence[Example], tokenizer: Any, *, source: str) -> None:
    """Refuse texts that contain a token which only a prompt may hold: the mask, a separator, a sentinel.

    Raises
    ------
    DataError
        Names the rows and the token.
    """
    special = [token for token in tokenizer.all_special_tokens if token]
    if not special:
        return
    for number, example in enumerate(examples, 1):
        for token in special:
            if token in example.text or token in (example.text2 or ""):
                raise DataError(
                    f"{source}, row {number}: the text contains {token}, which this base reads as a control token",
                    hint=f"replace {token} in the text",
                )


def label_names(examples: Sequence[Example], *, source: str) -> tuple[str, ...]:
    """The labels in a fixed order: numbers by value, then words by letters.

    Raises
    ------
    DataError
        One label only, or so many that the column is not one of labels.
    """
    names = in_order(str(e.label) for e in examples)
    if len(names) < 2:
        raise DataError(f"{source}: every row has the label {names[0]!r}", hint="a classifier needs two labels or more")
    if len(names) > _MOST_LABELS:
        raise DataError(
            f"{source}: {len(names)} different labels in {len(examples)} rows",
            hint="is --label the right column? at most 999 labels are learned",
        )
    return tuple(names)


def without_contradictions(examples: Sequence[Example], *, source: str) -> tuple[list[Example], int]:
    """The examples without texts that stand there with two labels or more, and how many rows those are, with a warning.

    Which of the labels is right cannot be told: nothing is learned from such a text, and nothing measured on it.
    """
    labels: dict[tuple[str, str], set[str]] = {}
    for example in examples:
        labels.setdefault(example.key, set()).add(str(example.label))
    kept = [example for example in examples if len(labels[example.key]) == 1]
    left_out = len(examples) - len(kept)
    if left_out:
        first = next(example for example in examples if len(labels[example.key]) > 1)
        told = ", ".join(sorted(labels[first.key]))
        log.warning(
            "%s: %d rows are left out: their texts have several labels (%.40r: %s)", source, left_out, first.text, told
        )
    if not kept:
        raise DataError(f"{source}: every text has several labels", hint="is --label the right column?")
    return kept, left_out


def count_cut(examples: Sequence[Example], tokenizer: Any, max_length: int, *, source: str) -> int:
    """How many examples are longer than `max_length` tokens, with a warning: what is behind that is not read."""
    if not examples:
        return 0
    pairs = None if examples[0].text2 is None else [str(e.text2) for e in examples]
    lengths = [len(ids) for ids in tokenizer([e.text for e in examples], pairs, verbose=False)["input_ids"]]
    cut = sum(length > max_length for length in lengths)
    if cut:
        log.warning(
            "%s: %d of %d texts are longer than %d tokens (the longest: %d) and are read up to there: --max-length",
            *(source, cut, len(lengths), max_length, max(lengths)),
        )
    return cut


def warn_of_duplicates(train: Sequence[Example], test: Sequence[Example], *, source: str) -> int:
    """Count test rows whose texts are also in the training rows, and say so: they flatter the result."""
    known = {e.key for e in train}
    twice = sum(count for key, count in Counter(e.key for e in test).items() if key in known)
    if twice:
        log.warning("%s: %d of %d test rows are also training rows", source, twice, len(test))
    return twice
