"""Four kinds of text that every Python machine has: code, reference, licences and package descriptions."""

from __future__ import annotations

import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from train.quickstart.corpus import SHORTEST, Document, GatheredTexts, within_limits

_RULER = re.compile(r"\n[ \t]*[-=*_#~]{8,}[ \t]*(?=\n)")  # the line between two licences of a bundle
_LICENCE_FILE = re.compile(r"(?i)^(?:licen[cs]e|copying|notice)|(?:[._-]licen[cs]e)(?:\.\w+)?$")
_NOT_PROSE = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
}
_NOT_PROSE |= {"turtledemo", "ensurepip", "__pycache__", "__phello__", "config", "lib-dynload"}


def builtin(seed: int) -> dict[str, GatheredTexts]:
    """Gather code, docs, licences and readmes from this Python installation, without any network."""
    sources: dict[str, Callable[[], Iterable[Document]]] = {
        "code": stdlib_source,
        "docs": pydoc_topics,
        "licences": licences,
        "readmes": readmes,
    }
    return {name: within_limits(name, source(), seed) for name, source in sources.items()}


def stdlib_source() -> Iterator[Document]:
    """Python source of the standard library, tests and tables apart."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _NOT_PROSE.isdisjoint(inside.parts):
            try:
                yield Document(inside.as_posix(), path.read_text("utf-8"))
            except (UnicodeDecodeError, OSError):
                continue  # a few modules are Latin-1, some installations hide a file: there are hundreds of others


def pydoc_topics() -> Iterator[Document]:
    """The language reference behind `help("if")`; empty where the installation has removed it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document(f"help({name!r})", text)


def licences() -> Iterator[Document]:
    """Licence files of the installed distributions and of Python itself; a bundle yields its parts."""
    for name, distribution in _distributions():
        for file in sorted(distribution.files or (), key=str):
            if not _LICENCE_FILE.search(file.name) or file.suffix in {".py", ".pyc"}:
                continue
            try:
                text = Path(str(distribution.locate_file(file))).read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            yield from _parts(f"{name}: {file.name}", text)
    own = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if own.is_file():
        yield from _parts("python: LICENSE.txt", own.read_text("utf-8"))


def readmes() -> Iterator[Document]:
    """Long descriptions of the installed distributions, as their authors wrote them for the package index."""
    for name, distribution in _distributions():
        payload = distribution.metadata.get("Description") or distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(payload, str):
            yield Document(f"{name}: description", payload)


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    """Installed distributions by name, this project apart; of two with one name, the first on the path."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name and name != "moduloom":
            found.setdefault(name, distribution)
    return sorted(found.items())


def _parts(name: str, text: str) -> Iterator[Document]:
    parts = [part for part in _RULER.split(text) if len(part) >= SHORTEST]
    if len(parts) <= 1:
        yield Document(name, text)
    else:
        yield from (Document(f"{name} [{i}]", part) for i, part in enumerate(parts, 1))
