"""How far a run has come, so that it goes on after any interruption as if there had been none.

Rows are taken in windows. `OUT` holds the rows of finished windows and grows by a whole window at a time (where `OUT`
is a table, `OUT.rows` does, and `OUT` is made of it in the end; see `router.running.tables`). Beside it `OUT.journal`
holds the settings, where the last window ended (in the input, in `OUT`), and the finished batches of the window under
way. What is computed together depends on the input and the settings alone, so a batch that was cut off comes out the
same when it is computed again. Both files are synced to disk before the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hub.errors import Conflict, UsageError
from hub.io.files import atomic_write, fsync_directory

VERSION = 2


@dataclass(frozen=True)
class Mark:
    """The end of a window: rows, lines and bytes of the input before it, their hash, bytes written, pinned refs."""

    rows: int = 0
    lines: int = 0
    offset: int = 0
    sha256: str = ""
    written: int = 0
    failed: int = 0
    pins: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """The journal of one output file.

    Parameters
    ----------
    out
        The output file.
    settings
        Everything that the output depends on besides the input; JSON.
    overwrite
        Begin anew, whatever is there.
    grows
        The file that grows, where it is not the output itself; it goes with the journal.

    Raises
    ------
    UsageError
        The output is there and finished, or was begun with other settings.
    Conflict
        Another process is writing it.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], *, overwrite: bool = False, grows: Path | None = None
    ) -> None:
        self.out, self.grows, self.path = out, grows or out, _beside(out)
        self._settings = json.loads(json.dumps(settings))
        self.mark = Mark()
        self.pins: dict[str, str] = {}
        self._batches: dict[str, list[Any]] = {}
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise Conflict(f"another process is writing {out}", path=out, hint="wait for it, or stop it") from None
        for young in out.parent.glob(f".{self.path.name}.*.tmp"):  # a kill has left them
            young.unlink()
        if overwrite:
            for file in (self.path, out, self.grows):
                file.unlink(missing_ok=True)
        self.resumed = self._open()

    def batch(self, key: str) -> list[Any] | None:
        """Answers of a batch of the window under way that was finished before an interruption."""
        return self._batches.get(key)

    def keep(self, key: str, answers: list[Any], pins: Mapping[str, str]) -> None:
        """Remember a finished batch of the window under way, and what its refs stood for."""
        with self.path.open("ab") as file:
            file.write(_line({"batch": key, "answers": answers, "pins": pins}))
            _sync(file)

    def commit(self, lines: bytes, mark: Mark) -> None:
        """Append a window's lines to the output; from now on they are there."""
        with self.grows.open("r+b") as file:
            file.seek(self.mark.written)
            file.truncate()
            file.write(lines)
            _sync(file)
        self.mark = mark
        self._batches = {}
        atomic_write(self.path, self._head())

    def finish(self) -> None:
        """The output is whole: forget the journal."""
        self.path.unlink(missing_ok=True)
        fsync_directory(self.path.parent)
        if self.grows != self.out:
            self.grows.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let another process go on."""
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _open(self) -> bool:
        if self.path.exists():
            resumed = self._read()
            if resumed is not None:
                return resumed
        else:
            try:
                refuse_finished(self.out)
            except UsageError:
                self.close()
                raise
        self.grows.touch()
        atomic_write(self.path, self._head())
        fsync_directory(self.out.parent)
        return False

    def _read(self) -> bool | None:
        """Go on where the journal says; None where not even its head was written."""
        *lines, torn = self.path.read_bytes().split(b"\n")
        if len(lines) < 2 or not self.grows.exists():
            return None
        if torn:  # cut off while it was written
            atomic_write(self.path, b"\n".join([*lines, b""]))
        head, mark, *batches = (json.loads(line) for line in lines)
        if head.get("settings") != self._settings or head.get("version") != VERSION:
            self.close()
            raise UsageError(
                f"{self.out} was begun with other settings: {_difference(head.get('settings') or {}, self._settings)}",
                path=self.path,
                hint="give the same ones to go on, or --overwrite to begin anew",
            )
        self.mark = Mark(**mark)
        self.pins = {**self.mark.pins, **{ref: d for record in batches for ref, d in record["pins"].items()}}
        self._batches = {record["batch"]: record["answers"] for record in batches}
        return True

    def _head(self) -> bytes:
        return _line({"version": VERSION, "settings": self._settings}) + _line(asdict(self.mark))


def refuse_finished(out: Path) -> None:
    """Raise UsageError where an output is there that no journal belongs to."""
    if not _beside(out).exists() and out.exists() and out.stat().st_size:
        raise UsageError(f"{out} is there already", path=out, hint="--overwrite replaces it, or give another --out")


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"  # keys in their own order: a row's columns are among them


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)] or ["the version of this program"]
    return ", ".join(f"{n} {old.get(n)!r}, now {new.get(n)!r}" for n in names)
