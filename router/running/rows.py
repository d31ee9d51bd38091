"""From a row to a request, and from an answer to the columns that are added to the row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hub.errors import HubError, UsageError
from router.engine.request import Request, Result

_DIGITS = 4  # of probabilities: more would show the rounding of the batch a row was computed in


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every row of a run shares; all of it changes the output.

    Attributes
    ----------
    text, pair, adapter_column, task_column, into
        Columns: of the text, of a second text, of the adapter's name, of the task that a router is asked for, and of
        the answer.
    adapter
        Ref, expression or router for all rows, where no column names one.
    route_weights
        Add the router's weights.
    on_error
        "stop" at the first bad line, or "skip" it and say so in its place.
    """

    text: str = "text"
    pair: str | None = None
    adapter_column: str | None = None
    task_column: str | None = None
    adapter: str | None = None
    into: str = "output"
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    scores: int = 0
    route_weights: bool = False
    on_error: str = "stop"

    def request(self, row: Mapping[str, Any], number: int) -> Request:
        """The request of the row at a line. Raises UsageError for a column that is missing or holds no text."""
        if clash := [name for name in row if name == self.into or name.startswith(self.into + "_")]:
            raise UsageError(
                f"has a column {clash[0]!r} already", hint="--into NAME puts the answer into another column"
            )
        return Request(
            text=_text(row, self.text, "--text"),
            pair=None if self.pair is None else _text(row, self.pair, "--pair"),
            adapter=self.adapter if self.adapter_column is None else _name(row, self.adapter_column, "an adapter"),
            task=None if self.task_column is None else _name(row, self.task_column, "a task"),
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=_seed(self.seed, number),
            scores=self.scores,
            weights=self.route_weights,
        )

    def columns(self, result: Result) -> dict[str, Any]:
        """Columns of a result."""
        said = (result.text, result.label, None if result.labels is None else list(result.labels), result.value)
        columns: dict[str, Any] = {self.into: next((one for one in said if one is not None), None)}
        if result.finish is not None:
            columns[f"{self.into}_finish"] = result.finish
        if self.scores and (result.label is not None or result.labels is not None):
            columns[f"{self.into}_scores"] = {name: round(p, _DIGITS) for name, p in result.scores}
        elif self.scores and result.text is not None:
            columns[f"{self.into}_scores"] = [
                {
                    "token": t.text,
                    "logprob": round(t.log_prob, _DIGITS),
                    "top": [[n, round(p, _DIGITS)] for n, p in t.best],
                }
                for t in result.tokens
            ]
        if self.route_weights:
            columns[f"{self.into}_weights"] = {name: round(w, _DIGITS) for name, w in result.weights.items()}
        return columns

    def failed(self, error: HubError) -> dict[str, Any]:
        """Columns of a row that could not be computed."""
        return {self.into: None, f"{self.into}_error": error.message}


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of JSONL."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(row).encode() + b"\n"


def _text(row: Mapping[str, Any], column: str, option: str) -> str:
    text = row.get(column)
    if column not in row:
        raise UsageError(f"has no column {column!r}; it has: {_columns(row)}", hint=f"name the column: {option} COLUMN")
    if not isinstance(text, str):
        raise UsageError(f"{column!r} is {json.dumps(text)[:40]}, not a text")
    if not text:
        raise UsageError(f"{column!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{column!r} holds half a character (a lone surrogate) at place {error.start + 1}") from None
    return text


def _name(row: Mapping[str, Any], column: str, what: str) -> str | None:
    """What a column names, if anything. Raises UsageError without the column, or if it holds no text."""
    if column not in row:
        raise UsageError(f"has no column {column!r}; it has: {_columns(row)}")
    name = row[column]
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{column!r} is {json.dumps(name)[:40]}, not the name of {what}")
    return name


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(row) or "none"


def _seed(seed: int, number: int) -> int:
    """The seed of a line's own stream of random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big")
