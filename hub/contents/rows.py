"""Rows of files, one after another: JSON lines, a JSON array, CSV, TSV, Parquet; JSON lines, CSV and TSV gzipped, too.

>>> for line in open_rows(Path("mails.csv.gz")):
...     line.number, line.row, line.error

A bad row does not end a file: it is an error in its place, with its line. What was consumed is counted and hashed, so
that a reader can go on where another one stopped.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from hub.errors import HubError, UsageError

Row: TypeAlias = dict[str, Any]
MAX_LINE = 16 * 2**20  # bytes
_CHUNK = 2**20
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class RowError(HubError):
    """A row that cannot be used; its line is in the message."""


@dataclass(frozen=True)
class Line:
    """One row: the line it begins at, from 1, and its columns or what is wrong with it."""

    number: int
    row: Row | None
    error: RowError | None = None


def format_of(path: str | Path) -> str:
    """The format that a name says, such as ``.csv`` of ``mails.csv.gz``; "" where it says none."""
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else ""


class Rows(ABC):
    """The rows of one source.

    Attributes
    ----------
    name
        What messages call it.
    count, number, offset
        Rows, lines and bytes consumed so far; of Parquet and JSON arrays the offset counts rows.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = self.number = self.offset = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes consumed so far; of Parquet and JSON arrays of the whole file."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Line]:
        for line in self._lines():
            self.count += 1
            yield line

    @abstractmethod
    def _lines(self) -> Iterator[Line]: ...

    @abstractmethod
    def _pass(self, count: int) -> bool: ...

    def skip(self, offset: int, *, count: int, number: int) -> bool:
        """Consume what another reader had: so many bytes, rows and lines; False where there are fewer."""
        there = self._pass(offset)
        self.count, self.number = count, number
        return there

    def _bad(self, number: int, what: str, hint: str | None = None) -> Line:
        error = RowError(f"{self.name}: line {number} {what}", path=self.name, hint=hint)
        return Line(number, None, error)


class _Streamed(Rows):
    """Rows of a binary stream."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        super().__init__(name)
        self._stream = stream

    def _pass(self, count: int) -> bool:
        while count > 0:
            part = self._stream.read(min(count, _CHUNK))
            if not part:
                return False
            self._seen(part)
            count -= len(part)
        return True

    def _seen(self, part: bytes) -> None:
        self._hash.update(part)
        self.offset += len(part)

    def _to_its_end(self) -> None:
        """Consume the rest of a line that is too long."""
        while rest := self._stream.readline(_CHUNK):
            self._seen(rest)
            if rest.endswith(b"\n"):
                return


class JsonLines(_Streamed):
    """A JSON object a line. Blank lines at the end are none."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        super().__init__(stream, name)
        self._ahead: deque[bytes] = deque()  # blank lines that were read to see whether something follows

    def _lines(self) -> Iterator[Line]:
        while text := self._next():
            self._seen(text)
            self.number += 1
            yield self._line(text)

    def _next(self) -> bytes:
        if self._ahead:
            return self._ahead.popleft()
        text = self._stream.readline(MAX_LINE + 1)
        if text.strip():
            return text
        while text and not text.strip():
            self._ahead.append(text)
            text = self._stream.readline(MAX_LINE + 1)
        if not text:
            self._ahead.clear()
            return b""
        self._ahead.append(text)
        return self._ahead.popleft()

    def _line(self, text: bytes) -> Line:
        if len(text) > MAX_LINE and not text.endswith(b"\n"):
            self._to_its_end()
            return self._bad(self.number, f"is longer than {MAX_LINE // 2**20} MiB")
        if not text.strip():
            return self._bad(self.number, "is empty", "every line is one JSON object")
        try:
            row = _parse(text.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else text)
        except ValueError as error:
            return self._bad(self.number, str(error), "every line is one JSON object")
        return Line(self.number, row)


class Cells(_Streamed):
    """CSV or TSV with a header line. Every cell is a text; blank lines are none."""

    def __init__(self, stream: BinaryIO, name: str, separator: str) -> None:
        super().__init__(stream, name)
        csv.field_size_limit(MAX_LINE)
        self._taken = 0  # bytes of the row under way
        self._csv = csv.reader(_Texts(self), delimiter=separator, strict=True)
        self._header: list[str] | None = None

    @property
    def header(self) -> list[str]:
        """Names of the columns. Raises RowError where the first line names none."""
        if self._header is None:
            try:
                found = next(self._csv, [])
            except (csv.Error, UnicodeDecodeError) as error:
                raise RowError(f"{self.name}: line 1 is no header: {error}", path=self.name) from None
            twice = [name for name in found if found.count(name) > 1]
            if not found or twice:
                what = f"names {twice[0]!r} twice" if twice else "names no columns"
                raise RowError(f"{self.name}: line 1 {what}", path=self.name, hint="the first line is the header")
            self._header = found
        return self._header

    def text(self) -> str:
        """The next line, for the parser."""
        if self._taken > MAX_LINE:
            raise csv.Error(f"is longer than {MAX_LINE // 2**20} MiB")
        line = self._stream.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        self._seen(line)
        self.number += 1
        self._taken += len(line)
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            self._to_its_end()
            raise csv.Error(f"is longer than {MAX_LINE // 2**20} MiB")
        return (line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line).decode("utf-8")

    def _pass(self, count: int) -> bool:
        if count and self.offset == 0:
            _ = self.header
        return super()._pass(count - self.offset)

    def _lines(self) -> Iterator[Line]:
        names = self.header
        while True:
            begins, self._taken = self.number + 1, 0
            try:
                cells = next(self._csv)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                yield self._bad(begins, f"is not UTF-8 (byte {error.start + 1})")
                continue
            except csv.Error as error:
                yield self._bad(begins, f"cannot be read: {error}")
                continue
            if cells and len(cells) != len(names):
                yield self._bad(begins, f"has {len(cells)} cells, and the header {len(names)}")
            elif cells:
                yield Line(begins, dict(zip(names, cells, strict=True)))


class _Texts:
    """The lines of `Cells`. Unlike a generator it goes on after an error."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        return self._cells.text()


class _Numbered(Rows):
    """Rows that are counted, of a file that is hashed as a whole."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                self._hash.update(part)
        self._rest = self._read(path)

    @abstractmethod
    def _read(self, path: Path) -> Iterator[Any]: ...

    def _lines(self) -> Iterator[Line]:
        for value in self._rest:
            self.offset += 1
            self.number += 1
            if isinstance(value, dict):
                yield Line(self.number, value)
            else:
                yield self._bad(self.number, f"holds {_kind(value)}, not an object", "every item is one JSON object")

    def _pass(self, count: int) -> bool:
        passed = sum(1 for _ in zip(range(count), self._rest, strict=False))
        self.offset = passed
        return passed == count


class JsonArray(_Numbered):
    """A file that is one JSON array of objects; line n is its item n."""

    def _read(self, path: Path) -> Iterator[Any]:
        try:
            values = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{self.name} is no JSON: {error}", path=path) from None
        return iter(cast("list[Any]", values))


class ParquetRows(_Numbered):
    """The rows of a Parquet file; line n is row n."""

    def _read(self, path: Path) -> Iterator[Any]:
        try:
            from pyarrow import ArrowException, parquet
        except ModuleNotFoundError as error:
            raise UsageError(f"{path} needs pyarrow to be read", path=path, hint="pip install pyarrow") from error
        try:
            file = parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise RowError(f"{path} is not a readable parquet file: {error}", path=path) from error

        def rows() -> Iterator[Any]:
            try:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
            except (ArrowException, OSError) as error:
                raise RowError(f"{path} is damaged behind row {self.count}: {error}", path=path) from error

        return rows()


@contextmanager
def open_rows(source: str | Path | BinaryIO, *, name: str | None = None) -> Iterator[Rows]:
    """The rows of a file by its suffix, or of a stream of JSON lines; any other name is JSON lines, too.

    Raises
    ------
    RowError
        A file that is not what its name says; while rows are read, one that is damaged.
    """
    if not isinstance(source, str | Path):
        yield JsonLines(source, name or "stdin")
        return
    path, told = Path(source), name or str(source)
    form, zipped = format_of(path), path.suffix.lower() == ".gz"
    if form == ".parquet" or (form == ".json" and not zipped and _begins(path) == b"["):
        if zipped:
            raise UsageError(f"{path} is compressed inside already", path=path, hint="gunzip it")
        yield (ParquetRows if form == ".parquet" else JsonArray)(path, told)
        return
    with gzip.open(path) if zipped else path.open("rb") as stream:
        try:
            separator = _SEPARATORS.get(form)
            binary = cast("BinaryIO", stream)
            yield JsonLines(binary, told) if separator is None else Cells(binary, told, separator)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RowError(f"{told} is not whole gzip: {error}", path=path) from error


def _begins(path: Path) -> bytes:
    """The first character that is no blank."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _parse(text: bytes) -> Row:
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
        raise ValueError(f"holds {_kind(row)}, not an object")
    return row


def _kind(value: object) -> str:
    kinds = {list: "array", str: "text", bool: "boolean", type(None): "null"}
    return f"a JSON {kinds.get(type(value), 'number')}"


def _refuse(word: str) -> None:
    raise ValueError(f"is not JSON: {word} is no number")
