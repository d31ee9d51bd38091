"""Rows of a JSONL stream by line, each with what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from hub.errors import HubError

MAX_LINE = 16 * 2**20  # bytes
_CHUNK = 2**20


class RowError(HubError):
    """A line that cannot be computed; its number is in the message."""


@dataclass(frozen=True)
class Line:
    """One line: its number from 1, and its row or its error."""

    number: int
    row: dict[str, Any] | None
    error: RowError | None = None


class Lines:
    """Lines of a binary stream; counts and hashes what was consumed.

    Attributes
    ----------
    name
        What messages call the stream.
    number, offset
        Lines and bytes consumed so far.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self.name = stream, name
        self.number = self.offset = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes consumed so far."""
        return self._hash.hexdigest()

    def skip(self, count: int, *, lines: int) -> bool:
        """Consume so many bytes that hold so many lines; False where the stream has fewer."""
        while count > 0:
            part = self._stream.read(min(count, _CHUNK))
            if not part:
                return False
            self._seen(part)
            count -= len(part)
        self.number = lines
        return True

    def __iter__(self) -> Iterator[Line]:
        while text := self._stream.readline(MAX_LINE + 1):
            self._seen(text)
            self.number += 1
            yield self._line(text)

    def _line(self, text: bytes) -> Line:
        if len(text) > MAX_LINE and not text.endswith(b"\n"):
            self._to_its_end()
            return self._bad(f"is longer than {MAX_LINE // 2**20} MiB")
        if not text.strip():
            return self._bad("is empty", "every line is one JSON object")
        try:
            row = _parse(text.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else text)
        except ValueError as error:
            return self._bad(str(error), "every line is one JSON object")
        return Line(self.number, row)

    def _to_its_end(self) -> None:
        while rest := self._stream.readline(_CHUNK):
            self._seen(rest)
            if rest.endswith(b"\n"):
                return

    def _bad(self, what: str, hint: str | None = None) -> Line:
        return Line(self.number, None, RowError(f"{self.name}: line {self.number} {what}", path=self.name, hint=hint))

    def _seen(self, part: bytes) -> None:
        self._hash.update(part)
        self.offset += len(part)


def _parse(text: bytes) -> dict[str, Any]:
    """The object of one line; ValueError says what else it is."""
    try:
        row = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(row, dict):
        kinds = {list: "array", str: "text", bool: "boolean", type(None): "null"}
        raise ValueError(f"holds a JSON {kinds.get(type(row), 'number')}, not an object")
    return row


def _refuse(word: str) -> None:
    raise ValueError(f"is not JSON: {word} is no number")
