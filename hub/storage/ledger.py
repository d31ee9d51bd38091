"""The append-only log of a store: who was published, which alias moved, what was yanked. The store's truth.

One canonical JSON object a line, each with the sha256 of the line before it, so any mirror can check that
nothing was taken out or changed. Everything else in a store but the blobs can be rebuilt from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from hub.errors import IntegrityError
from hub.io import canonical_json as canonical
from hub.io.files import group_mode, share
from hub.ref import name_key

GENESIS = "sha256:" + "0" * 64
Op = Literal["publish", "alias", "yank", "unyank", "delete", "evict"]
# What a line of each operation must say.
_NEEDED: dict[str, tuple[str, ...]] = dict.fromkeys(get_args(Op), ("name", "digest", "version"))
_NEEDED |= {"alias": ("name", "alias"), "yank": ("name", "digest"), "unyank": ("name", "digest")}


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log.

    Attributes
    ----------
    op
        ``publish``, ``alias`` (moved, or removed where `digest` is None), ``yank``, ``unyank``, ``delete`` (dead for
        good) or ``evict`` (its bytes made room; the same digest may come back).
    name
        ``ns/name``.
    digest
        The manifest it is about.
    version, alias, reason
        What the operation needs of them.
    time
        UTC, ISO 8601, seconds.
    """

    op: Op
    name: str
    digest: str | None
    version: str | None = None
    alias: str | None = None
    reason: str | None = None
    time: str = ""


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two lines: the byte offset, the number of lines before it and the hash of the last."""

    offset: int = 0
    seq: int = 0
    head: str = GENESIS


def line_of(event: Event, at: Position) -> bytes:
    """Canonical JSON of an event that stands behind a position, without its newline; timed now where it has no time."""
    now = datetime.now(timezone.utc).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    fields = {
        "seq": at.seq + 1,
        "prev": at.head,
        "time": event.time or now,
        "op": event.op,
        "name": event.name,
        "digest": event.digest,
        "version": event.version,
        "alias": event.alias,
        "reason": event.reason,
    }
    return canonical.dumps({key: value for key, value in fields.items() if value is not None})


def load_line(line: bytes, *, what: str) -> dict[str, Any]:
    """Read a line as JSON. Raises IntegrityError where it is none, or holds no event that this version knows."""
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise IntegrityError(f"{what} holds a line that is not JSON: {error}", path=what) from error
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    needed = _NEEDED.get(str(fields.get("op")))
    if needed is None or not all(isinstance(fields.get(name), str) for name in needed):
        raise IntegrityError(
            f"{what} holds an entry that this version does not know: {line[:80]!r}",
            path=what,
            hint="upgrade moduloom, or restore the file",
        )
    return fields


def event_of(value: dict[str, Any]) -> Event:
    """Event of a line that was read."""
    return Event(
        op=value["op"],
        name=value["name"],
        digest=value.get("digest"),
        version=value.get("version"),
        alias=value.get("alias"),
        reason=value.get("reason"),
        time=value.get("time", ""),
    )


class Ledger:
    """The log file. Reading needs no lock; `append` is called under the store's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes of the file, 0 where there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def end(self) -> Position:
        """Position behind the last whole line, read from the file's tail alone."""
        size = self.size
        if not size:
            return Position()
        # Read backwards, ever more, until the last whole line is in sight from its start.
        with self.path.open("rb") as file:
            window = 2**16
            while True:
                file.seek(max(size - window, 0))
                tail = file.read(size)
                stop = tail.rfind(b"\n") + 1
                start = tail.rfind(b"\n", 0, max(stop - 1, 0)) + 1
                if (stop and start) or window >= size:
                    break
                window *= 16
        if not stop:  # one line, and that one torn
            return Position()
        line = tail[start : stop - 1]
        offset = max(size - window, 0) + stop
        return Position(offset, int(self._load(line).get("seq", 0)), canonical.digest(line))

    def read(self, start: Position | None = None) -> Iterator[tuple[Event, Position]]:
        """Events after a position, each with the position behind it; the chain is checked on the way.

        A last line without its newline was torn by a kill or a full disk: it never happened.

        Raises
        ------
        IntegrityError
            A line that is not JSON, or does not follow from the one before it.
        """
        at = start or Position()
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(at.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                at, event = self._step(line, at)
                yield event, at

    def about(self, name: str) -> Iterator[Event]:
        """Events of one name, however it was written, without the cost of reading the others."""
        needle = b'"name":' + canonical.dumps(name_key(name))
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if needle in line.lower() and line.endswith(b"\n"):
                    yield event_of(self._load(line))

    def _step(self, line: bytes, at: Position) -> tuple[Position, Event]:
        value = self._load(line)
        if value.get("prev") != at.head or value.get("seq") != at.seq + 1:
            raise IntegrityError(
                f"{self.path.name} does not chain at line {at.seq + 1}: a line was changed or taken out",
                path=self.path,
                hint="restore the file from a mirror; the artifacts themselves can be checked with `hub verify`",
            )
        behind = Position(at.offset + len(line), at.seq + 1, canonical.digest(line[:-1]))
        return behind, event_of(value)

    def _load(self, line: bytes) -> dict[str, Any]:
        return load_line(line, what=self.path.name)

    def append(self, event: Event, at: Position) -> Position:
        """Add one event behind a position, which must be the end; durable when it returns.

        A torn line behind the position is cut off first. When the disk is full, the file is as before.
        """
        line = line_of(event, at)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        mode = group_mode(self.path.parent, 0o644)
        new = not self.path.exists()
        with os.fdopen(os.open(self.path, flags, mode), "r+b", buffering=0) as file:
            if new:  # whatever the umask of the first one: the others write to it, too
                share(self.path)
            file.truncate(at.offset)
            file.seek(at.offset)
            try:
                if file.write(line + b"\n") != len(line) + 1:
                    raise OSError(28, os.strerror(28), str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(at.offset)
                raise
        return Position(at.offset + len(line) + 1, at.seq + 1, canonical.digest(line))
