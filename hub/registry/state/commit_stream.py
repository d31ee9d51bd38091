"""Reading a commit: newline-delimited JSON whose file contents go straight to disk, however large they are.

Each line is ``{"key": ..., "value": {...}}``: one ``header``, then ``file`` (base64 content inline), ``lfsFile``
(bytes sent before), ``deletedFile`` and ``deletedFolder``. The only thing ever held in memory is a line without its
content, and a block of that content.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, StringConstraints, ValidationError

from hub.contents.checks import IGNORED
from hub.errors import ManifestError
from hub.io import canonical_json as canonical
from hub.io.files import check_relative
from hub.registry.errors import ApiError, too_large
from hub.registry.limits import Limits
from hub.registry.state.git_ids import File

Verb = Literal["add", "link", "delete", "delete_folder"]


@dataclass(frozen=True)
class Operation:
    """One change of a tree.

    Attributes
    ----------
    verb
        ``add`` (bytes in `staged`), ``link`` (bytes sent before), ``delete`` or ``delete_folder``.
    path
        In the repository.
    file
        Content of what is added or linked; the size of a link is -1 where the client did not say it.
    staged
        Where the bytes of an addition are.
    """

    verb: Verb
    path: str
    file: File | None = None
    staged: Path | None = None


@dataclass(frozen=True)
class CommitRequest:
    """A commit as the client asked for it."""

    title: str
    description: str
    parent: str | None
    operations: list[Operation] = field(default_factory=list)


class _Loose(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


def ignored(path: str) -> bool:
    """Whether a file is left out without a word: what git and desktops leave behind."""
    return not IGNORED.isdisjoint(path.split("/"))


def _check_path(path: str) -> str:
    return path if ignored(path) else check_relative(path)


SafePath = Annotated[str, AfterValidator(_check_path)]
SafeFolder = Annotated[str, AfterValidator(lambda path: _check_path(path.rstrip("/")))]


class _Header(_Loose):
    summary: Annotated[str, StringConstraints(max_length=4096)] = ""
    description: Annotated[str, StringConstraints(max_length=65536)] = ""
    parentCommit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{7,40}$")] | None = None


class _Content(_Loose):
    path: SafePath
    encoding: Literal["base64"] = "base64"


class _Pointer(_Loose):
    path: SafePath
    algo: Literal["sha256"] = "sha256"
    oid: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: NonNegativeInt | None = None


class _Deleted(_Loose):
    path: SafePath


class _DeletedFolder(_Loose):
    path: SafeFolder


def read_commit(chunks: Iterable[bytes], room: Path, limits: Limits) -> CommitRequest:
    """Read a commit's body.

    Parameters
    ----------
    chunks
        The body.
    room
        An empty directory for the bytes of files.
    limits
        Caps.

    Raises
    ------
    ApiError
        400 naming the line that is malformed, 413 for what is too large.
    """
    commit: CommitRequest | None = None
    for number, (line, content) in enumerate(_Lines(chunks, room, limits), start=1):
        key, value = _line(line, number)
        if commit is None:
            if key != "header":
                raise ApiError(400, "the first line of a commit is its header")
            header = _check(_Header, value, number)
            commit = CommitRequest(header.summary, header.description, header.parentCommit)
            continue
        commit.operations.append(_operation(key, value, content, number))
        if len(commit.operations) > limits.operations:
            raise ApiError(413, f"a commit has at most {limits.operations} operations")
    if commit is None:
        raise ApiError(400, "a commit begins with its header")
    return commit


def _line(line: bytes, number: int) -> tuple[str, dict[str, Any]]:
    try:
        entry = canonical.loads(line, what=f"line {number} of the commit")
    except ManifestError as error:
        raise ApiError(400, error.message) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), dict):
        raise ApiError(400, f'line {number} of the commit is not {{"key": ..., "value": {{...}}}}')
    return str(entry.get("key")), entry["value"]


def _operation(key: str, value: dict[str, Any], content: _Sink | None, number: int) -> Operation:
    if key == "file":
        if content is None:
            raise ApiError(400, f"line {number} of the commit has no content")
        path = _check(_Content, value, number).path
        return Operation("add", path, content.finish(), content.path)
    if key == "lfsFile":
        pointer = _check(_Pointer, value, number)
        return Operation("link", pointer.path, File(pointer.oid, -1 if pointer.size is None else pointer.size))
    if key == "deletedFile":
        return Operation("delete", _check(_Deleted, value, number).path)
    if key == "deletedFolder":
        return Operation("delete_folder", _check(_DeletedFolder, value, number).path)
    raise ApiError(400, f"line {number} of the commit has the unknown key {key[:40]!r}")


def _check(model: type[Any], value: dict[str, Any], number: int) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"line {number} of the commit: {place}: {reason}") from error


class _Lines:
    """Lines of a body, each with the sink that took its ``content`` string (which is empty in the line)."""

    def __init__(self, chunks: Iterable[bytes], room: Path, limits: Limits) -> None:
        self._chunks = iter(chunks)
        self._room = room
        self._limits = limits
        self._buffer = b""
        self._at = 0
        self._json_left = limits.json
        self._bytes_left = limits.commit
        self._files = 0

    def __iter__(self) -> Iterator[tuple[bytes, _Sink | None]]:
        while self._more():
            line, sink = self._line()
            if line.strip():
                yield line, sink

    def _more(self) -> bool:
        """Whether there is a byte left to read; fetches the next chunk where the buffer is used up."""
        while self._at >= len(self._buffer):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._buffer, self._at = chunk, 0
        return True

    def _take(self, *marks: bytes) -> tuple[bytes, bytes]:
        """Bytes up to the first of the marks, or to the end of the buffer, and that mark (empty: none yet)."""
        places = [place for mark in marks if (place := self._buffer.find(mark, self._at)) >= 0]
        stop = min(places, default=len(self._buffer))
        taken = self._buffer[self._at : stop]
        mark = self._buffer[stop : stop + 1]
        self._at = stop + len(mark)
        return taken, mark

    def _line(self) -> tuple[bytes, _Sink | None]:
        line, sink, string = bytearray(), None, b""
        while self._more():
            taken, mark = self._take(b'"', b"\n")
            self._keep(line, taken)
            if mark == b"\n":
                break
            if not mark:
                continue
            if string == b"content" and line.rstrip(b" \t").endswith(b":"):
                if sink is not None:
                    raise ApiError(400, "a line of the commit has two contents")
                sink = self._content()
                line += b'""'
            else:
                string = self._string()
                self._keep(line, b'"' + string + b'"')
        return bytes(line), sink

    def _keep(self, line: bytearray, part: bytes) -> None:
        self._json_left -= len(part)
        if self._json_left < 0:
            raise too_large("a commit without its contents", self._limits.json)
        line += part

    def _string(self) -> bytes:
        """Rest of a JSON string, its escapes as they are, up to the closing quote."""
        text = bytearray()
        while self._more():
            taken, mark = self._take(b'"', b"\\", b"\n")
            text += taken
            if len(text) > self._json_left:
                raise too_large("a commit without its contents", self._limits.json)
            if mark == b'"':
                return bytes(text)
            if mark == b"\n":
                break
            if mark and self._more():
                text += mark + self._buffer[self._at : self._at + 1]
                self._at += 1
        raise ApiError(400, "the commit ends inside a string")

    def _content(self) -> _Sink:
        self._files += 1
        sink = _Sink(self._room / f"{self._files}.file", self._limits)
        with sink:
            while self._more():
                taken, mark = self._take(b'"')
                written = sink.feed(taken)
                self._bytes_left -= written
                if self._bytes_left < 0:
                    raise too_large("a commit", self._limits.commit)
                if mark:
                    return sink
        raise ApiError(400, "the commit ends inside the content of a file")


class _Sink:
    """A file that is fed base64 text."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self._limit = limits.inline
        self._hasher = hashlib.sha256()
        self._size = 0
        self._carry = b""
        self._ended = False

    def __enter__(self) -> _Sink:
        self._file = self.path.open("xb")
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def feed(self, text: bytes) -> int:
        """Decode and write what is whole of the text; returns the count of bytes written."""
        text = self._carry + text
        if b"\\" in text:  # some JSON writers escape the slash; one that is cut off waits for its slash
            text, cut = (text[:-1], b"\\") if text.endswith(b"\\") else (text, b"")
            text = text.replace(b"\\/", b"/")
        else:
            cut = b""
        whole = len(text) - len(text) % 4
        self._carry = text[whole:] + cut
        return self._write(text[:whole]) if whole else 0

    def _write(self, text: bytes) -> int:
        if self._ended:
            raise ApiError(400, "the content of a file goes on behind its padding")
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ApiError(400, f"the content of a file is not base64: {error}") from error
        self._ended = text.endswith(b"=")
        self._size += len(data)
        if self._size > self._limit:
            raise too_large("a file inside a commit", self._limit)
        self._hasher.update(data)
        self._file.write(data)
        return len(data)

    def finish(self) -> File:
        """Content that was written."""
        if self._carry:
            raise ApiError(400, "the content of a file is not whole base64")
        return File(self._hasher.hexdigest(), self._size)
