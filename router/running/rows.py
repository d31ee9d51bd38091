"""From a row to a request, and from an answer to the columns that are added to the row."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from hub.errors import HubError, UsageError
from router.engine.job import BREAKDOWNS
from router.engine.request import Request, Result

MESSAGES = "messages"
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
    chat
        The text is what a user says, to be put into the base's chat template. A row with a column ``messages`` (turns
        of a chat: role and content) instead of a text is put into it anyway.
    on_error
        "skip" a bad row and say so in its place, or "stop" at the first one.
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
    chat: bool = False
    on_error: str = "skip"

    def request(self, row: Mapping[str, Any], number: int, render: Render | None = None) -> Request:
        """The request of the row at a line; without `render` its messages are looked at, but not put into a template.

        Raises UsageError for a column that is missing or holds no text, or messages that the template refuses.
        """
        if clash := [name for name in row if name == self.into or name.startswith(self.into + "_")]:
            raise UsageError(
                f"has a column {clash[0]!r} already", hint="--into NAME puts the answer into another column"
            )
        turns = self._turns(row)
        return Request(
            text=_text(row, self.text, "--text") if turns is None else render(turns) if render else "checked",
            special=turns is None,
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

    def _turns(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The chat that a row is; None where it is a text."""
        if self.text not in row and MESSAGES in row:
            return _messages(row[MESSAGES])
        return [{"role": "user", "content": _text(row, self.text, "--text")}] if self.chat else None

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


class Render:
    """From the turns of a chat to the text that the base's chat template makes of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """Raise UsageError where there is no template, or it refuses the turns."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise UsageError("is a chat, and this base has no chat template", hint="give texts, and no --chat")
        try:
            return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))
        except (TemplateError, AttributeError, ArithmeticError, *BREAKDOWNS) as error:
            raise UsageError(f"is a chat that the base's template refuses: {error}") from error


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of JSONL; what JSON has no word for, such as a date of a Parquet file, is written as text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=_as_text).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(row, default=_as_text).encode() + b"\n"


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return b64encode(value).decode()
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def _messages(value: Any) -> list[dict[str, Any]]:
    """Turns of a chat, given as a list or, in a cell of a table, as its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UsageError(f"{MESSAGES!r} is no JSON: {value[:40]}") from None
    turns = value if isinstance(value, list) else []
    fine = [isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns]
    if not fine or not all(fine):
        what = f"its item {fine.index(False) + 1} is none" if fine else "it is no list of them"
        hint = '[{"role": "user", "content": "..."}]'
        raise UsageError(f"{MESSAGES!r} holds turns with a role and a content, and {what}", hint=hint)
    return [{name: part for name, part in turn.items() if part is not None} for turn in turns]


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
