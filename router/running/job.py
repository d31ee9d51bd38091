"""The run itself: windows of lines, batches within them, answers in the order of the lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, BinaryIO, Protocol

from hub.contents.rows import Line, RowError, Rows
from hub.errors import HubError
from router.engine.engine import Engine
from router.engine.job import Answer
from router.engine.prepare import PreparedRow
from router.running.journal import Mark
from router.running.rows import Options, Render, encode

WINDOW = 16  # batches: rows are sorted by length within so many


class Sink(Protocol):
    """Where answers go: a `Journal`, or a `Stream`."""

    mark: Mark

    def batch(self, key: str) -> list[Any] | None:
        """Answers of a batch that was computed before an interruption."""

    def keep(self, key: str, answers: list[Any], pins: Mapping[str, str]) -> None:
        """Remember a batch."""

    def commit(self, lines: bytes, mark: Mark) -> None:
        """Write a window."""

    def finish(self) -> None:
        """All is written."""

    def close(self) -> None:
        """Let go of it, finished or not."""


class Stream:
    """Answers to a stream, which cannot be gone on with."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.mark = Mark()

    def batch(self, key: str) -> list[Any] | None:
        """Nothing is remembered."""
        return None

    def keep(self, key: str, answers: list[Any], pins: Mapping[str, str]) -> None:
        """Nothing is remembered."""

    def commit(self, lines: bytes, mark: Mark) -> None:
        """Write the lines."""
        self._stream.write(lines)
        self._stream.flush()
        self.mark = mark

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """The stream is the caller's."""


@dataclass(frozen=True)
class Outcome:
    """Rows in all, rows that failed, the first failure of this process, its rows, and the seconds they took."""

    rows: int
    failed: int
    first: HubError | None
    computed: int
    seconds: float


def check(lines: Rows, options: Options) -> dict[str, int]:
    """Read a whole input for what would stop the run later; returns each adapter it names and the first such line.

    Raises
    ------
    RowError
        The first bad line.
    """
    adapters: dict[str, int] = {}
    for line in lines:
        if line.row is None:
            raise line.error or RowError(f"line {line.number}")
        try:
            request = options.request(line.row, line.number)
        except HubError as error:
            raise _at(line, lines.name, error) from error
        adapters.setdefault(request.adapter or "", line.number)
    return adapters


def check_adapters(engine: Engine, named: Mapping[str, int], source: str) -> None:
    """Look up every adapter that an input names. Raises RowError with the first line of one that cannot be used."""
    for adapter, number in named.items():
        try:
            engine.targets.get(adapter)
        except HubError as error:
            raise _at(Line(number, None), source, error) from error


def go(
    engine: Engine,
    lines: Rows,
    options: Options,
    sink: Sink,
    *,
    advance: Callable[[int], None] = lambda _: None,
    pack: Callable[[bytes], bytes] = bytes,
) -> Outcome:
    """Compute all lines that the sink does not have yet; `pack` is what becomes of a window's lines before they go.

    Raises
    ------
    RowError
        With ``on_error="stop"``: the first line that cannot be computed. All windows before it are written.
    """
    mark, first, started, before = sink.mark, None, perf_counter(), sink.mark.rows
    while window := list(islice(lines, WINDOW * engine.rows)):
        answers = _window(engine, window, options, sink, lines.name)
        errors = [answer for answer in answers if isinstance(answer, HubError)]
        first = first or next(iter(errors), None)
        text = pack(b"".join(_out(line, answer, options) for line, answer in zip(window, answers, strict=True)))
        mark = Mark(
            rows=lines.count,
            lines=lines.number,
            offset=lines.offset,
            sha256=lines.sha256,
            written=mark.written + len(text),
            failed=mark.failed + len(errors),
            pins=dict(engine.sources.pins),
        )
        advance(lines.offset - sink.mark.offset)
        sink.commit(text, mark)
    return Outcome(mark.rows, mark.failed, first, mark.rows - before, perf_counter() - started)


def _window(
    engine: Engine, window: list[Line], options: Options, sink: Sink, source: str
) -> list[dict[str, Any] | HubError]:
    answers: dict[int, dict[str, Any] | HubError] = {}

    def fail(line: Line, error: HubError) -> None:
        named = error if isinstance(error, RowError) else _at(line, source, error)
        if options.on_error == "stop":
            raise named
        answers[line.number] = named

    render = Render(engine.host.tokenizer)
    ready: list[PreparedRow] = []
    readable: list[Line] = []
    for line in window:
        try:
            if line.row is None:
                raise line.error or RowError("?")
            ready.append(engine.prepare(options.request(line.row, line.number, render)))
            readable.append(line)
        except HubError as error:
            fail(line, error)
    rows: list[PreparedRow] = []
    owners: list[Line] = []
    for line, routed in zip(readable, engine.route(ready), strict=True):
        if isinstance(routed, HubError):
            fail(line, routed)
        else:
            rows.append(routed)
            owners.append(line)
    for batch, results in _computed(engine, rows, options, sink):
        for i, answer in zip(batch, results, strict=True):
            if isinstance(answer, HubError):
                fail(owners[i], answer)
            else:
                answers[owners[i].number] = answer
    return [answers[line.number] for line in window]


def _computed(
    engine: Engine, rows: list[PreparedRow], options: Options, sink: Sink
) -> Iterator[tuple[list[int], list[dict[str, Any] | HubError]]]:
    """Batches with their answers: from the journal those that it has, computed the others."""
    cut = engine.batches(rows)
    for number, batch in enumerate(cut):
        kept = sink.batch(str(number))
        if kept is not None:
            yield batch, kept
            continue
        following = [rows[i] for i in cut[number + 1]] if number + 1 < len(cut) else []
        answers = [_columns(answer, options) for answer in engine.compute([rows[i] for i in batch], following)]
        if not any(isinstance(answer, HubError) for answer in answers):
            sink.keep(str(number), answers, engine.sources.pins)
        yield batch, answers


def _columns(answer: Answer, options: Options) -> dict[str, Any] | HubError:
    return answer if isinstance(answer, HubError) else options.columns(answer)


def _out(line: Line, answer: dict[str, Any] | HubError, options: Options) -> bytes:
    if not isinstance(answer, HubError):
        return encode({**(line.row or {}), **answer})
    row = {"line": line.number} if line.row is None else dict(line.row)
    for name in options.failed(answer):
        row.pop(name, None)
    return encode({**row, **options.failed(answer)})


def _at(line: Line, source: str, error: HubError) -> RowError:
    what = error.message
    joint = " " if what.startswith("has ") else ": "
    return RowError(f"{source}: line {line.number}{joint}{what}", ref=error.ref, path=source, hint=error.hint)
