"""What a cell of a row may be: text, the name of a class, a list of either, a conversation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = [
    "CellError",
    "class_name",
    "conversation",
    "in_order",
    "label_set",
    "number",
    "read_cell",
    "shape_hint",
    "text",
]

# Columns of rows that other programs write, and how they are named here.
_SHAPES = (
    ({"instruction", "output"}, "rows of Alpaca: columns.prompt=instruction columns.completion=output"),
    ({"question", "answer"}, "columns.prompt=question columns.completion=answer"),
    ({"conversations"}, "rows of ShareGPT: rename from and value to role and content, then columns.messages=..."),
    ({"chosen", "rejected"}, "preference pairs: columns.completion=chosen learns what was chosen, nothing the rest"),
    ({"tokens", "ner_tags"}, "columns.tags=ner_tags"),
)


class CellError(ValueError):
    """A value is not what its column is for; the text says what it is, `hint` what would do."""

    def __init__(self, told: str, hint: str | None = None) -> None:
        super().__init__(told)
        self.hint = hint


def text(value: Any) -> str:
    """A text; a number is its digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    turns = isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, Mapping) for turn in value)
    hint = "a conversation stands in one column: columns.messages=..." if turns else "write it as one text"
    raise CellError(f"is {_told(value)}, not text", hint)


def class_name(value: Any) -> str:
    """The name of a class: a text, a whole number (1 and 1.0 are one class), or a truth value as JSON writes it.

    Spaces around it are no part of it; an empty cell and the NaN that other programs write for one are no class.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int):
        name = str(value).strip()
        if name and name.lower() != "nan":
            return name
        raise CellError(f"is {'NaN' if name else 'empty'}, not a label", "remove the row, or write its label")
    hint = "task=regression learns numbers" if isinstance(value, float) and math.isfinite(value) else None
    raise CellError(f"is {_told(value)}, not one label", hint or "one label a row: a text or a whole number")


def label_set(value: Any, separator: str | None = None) -> tuple[str, ...]:
    """Names of the classes of a row that may have any number: a list, or a text that `separator` divides.

    An empty list, or an empty text, is none.
    """
    if isinstance(value, str) and separator is not None:
        return tuple(dict.fromkeys(name.strip() for name in value.split(separator) if name.strip()))
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(map(class_name, value)))
    raise CellError(f"is {_told(value)}, not a list of labels", 'labels in one text are divided: --separator ","')


def number(value: Any) -> float:
    """A finite number, also as its digits."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise CellError(f"{value!r:.60} is not a finite number", "task=classification")
    return found


def conversation(value: Any) -> list[Mapping[str, Any]]:
    """Messages with a role and a text each; a message that calls tools may have none."""
    if not isinstance(value, list | tuple) or not value:
        raise CellError("messages are not a list", '[{"role": "user", "content": "..."}, ...]')
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise CellError(f"a message is not a role and a content: {str(message)[:60]}")
        content = message["content"]
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise CellError(f"the content of a message is {_told(content)}, not text", "write it as one text")
        if message.get("weight", 1) not in (0, 1):
            raise CellError(f"a message has the weight {message['weight']!r}", "0 is not learned, 1 is")
    return list(value)


def _list_of(read: Callable[[Any], str]) -> Callable[[Any], list[str]]:
    def cells(value: Any) -> list[str]:
        if not isinstance(value, list | tuple):
            raise CellError(f"is {_told(value)}, not a list", 'one entry a word: ["A", "film"]')
        return [read(one) for one in value]

    return cells


_READERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("text", "text_pair", "prompt", "completion"), text),
    "label": class_name,
    "number": lambda value: value,  # read where it becomes one
    "tokens": _list_of(text),
    "tags": _list_of(class_name),
    "messages": conversation,
}


def read_cell(role: str, value: Any) -> Any:
    """The value of a role; CellError where it is none."""
    return _READERS[role](value)


def in_order(names: Iterable[str]) -> list[str]:
    """Different names of classes: whole numbers by value, then the others by letters."""
    return sorted(set(names), key=lambda n: (0, int(n), "") if re.fullmatch(r"-?[0-9]+", n) else (1, 0, n))


def shape_hint(columns: Iterable[str]) -> str | None:
    """How to name the columns of rows in a shape that other programs write."""
    there = set(columns)
    return next((hint for known, hint in _SHAPES if known <= there), None)


def _told(value: Any) -> str:
    """`a list`, `null`, `NaN`, ... as the files have it."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    names = {bool: "true or false", float: "a fraction", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
