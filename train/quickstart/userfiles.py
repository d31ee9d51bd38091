"""The user's own domains: `--domain name=PATH`, checked before anything is loaded or written."""

from __future__ import annotations

import codecs
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hub.errors import UsageError
from train.quickstart.corpus import DOMAIN_CHARS, Document, GatheredTexts, within_limits

FEW_DOCUMENTS = 8  # fewer are divided into passages, else there is nothing to split
PASSAGE_CHARS = 4_000
_DOMAIN_NAME = re.compile(r"[a-z](?:[a-z0-9._-]{0,62}[a-z0-9])?")  # a number is no adapter in an expression


def parse_domains(options: Sequence[str]) -> dict[str, Path]:
    """`["law=texts/law", "mail=mail.jsonl"]` -> names and paths, in order.

    Raises
    ------
    UsageError
        Not NAME=PATH, a name that cannot name an adapter, a name given twice, or fewer than two domains.
    """
    domains: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not path:
            raise UsageError(f"--domain {option!r} is not NAME=PATH", hint="for example --domain law=texts/law")
        if not _DOMAIN_NAME.fullmatch(name) or ".." in name:
            raise UsageError(
                f"domain name {name!r} cannot name an adapter",
                hint="a lower-case letter, then letters, digits, '.', '_' and '-'",
            )
        if name in domains:
            raise UsageError(f"domain {name!r} is given twice", hint="give one folder with all its text")
        domains[name] = Path(path).expanduser()
    if len(domains) < 2:
        raise UsageError(
            f"routing needs at least two domains, got {len(domains)}",
            hint="repeat --domain NAME=PATH for each kind of text",
        )
    return domains


def read_domain(name: str, path: Path, seed: int) -> GatheredTexts:
    """Read the user's text: a UTF-8 file, a .jsonl file with a "text" field a line, or a folder of such files.

    Hidden files and links are not followed. A file that is not text is left out of a folder and named in `left_out`;
    given by itself it is an error.

    Raises
    ------
    UsageError
        The path is missing or unreadable, binary, or holds no text.
    """
    if not path.exists():
        raise UsageError(
            f"domain {name!r}: {path} does not exist",
            path=path,
            hint="give --domain NAME=PATH of a text file or folder",
        )
    files = _text_files(path) if path.is_dir() else [path]
    documents: list[Document] = []
    left_out: list[str] = []
    budget = 4 * DOMAIN_CHARS  # a folder of gigabytes is sampled, not read
    random.Random(f"{seed}/files").shuffle(files)  # noqa: S311  (no secret)
    for file in files:
        if budget <= 0:
            break
        try:
            read = list(_read_file(name, path, file, budget))
        except UsageError as error:
            if file is path or not path.is_dir():
                raise
            left_out.append(str(error))
            continue
        documents += read
        budget -= sum(len(document.text) for document in read)
    if not any(document.text.strip() for document in documents):
        raise UsageError(
            f"domain {name!r}: {path} holds no text", path=path, hint="give a file or folder of UTF-8 text"
        )
    if len(documents) < FEW_DOCUMENTS:
        documents = [passage for document in documents for passage in passages(document)]
    gathered = within_limits(name, documents, seed)
    return GatheredTexts(gathered.documents, (*left_out, *gathered.left_out))


def _text_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        paths = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        files += [p for p in paths if p.is_file() and not p.is_symlink()]
    return files


def _unreadable(error: OSError) -> None:
    raise UsageError(
        f"cannot read the folder {error.filename}: {error.strerror}", hint="check its permissions"
    ) from error


def _read_file(domain: str, root: Path, file: Path, budget: int) -> Iterator[Document]:
    """Yield the documents of one file; a UsageError names what is wrong with it."""
    if not file.is_file():
        raise UsageError(
            f"domain {domain!r}: {file} is not a regular file", path=file, hint="give a text file or a folder"
        )
    try:
        with file.open("rb") as stream:
            data = stream.read(4 * budget)  # at most four bytes a character
    except OSError as error:
        raise UsageError(
            f"domain {domain!r}: cannot read {file}: {error.strerror}",
            path=file,
            hint="check its permissions",
        ) from error
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data)  # a character cut by the budget is not an error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"domain {domain!r}: {file} is not UTF-8 text (byte {error.start})",
            path=file,
            hint="convert it to UTF-8",
        ) from error
    if "\0" in text:
        raise UsageError(f"domain {domain!r}: {file} is a binary file", path=file, hint="give UTF-8 text")
    name = file.relative_to(root).as_posix() if file != root else file.name
    if file.suffix == ".jsonl":
        yield from _json_lines(domain, name, file, text[:budget])
    else:
        yield Document(name, text[:budget])


def _json_lines(domain: str, name: str, file: Path, text: str) -> Iterator[Document]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1:
                return  # the line that the size limit has cut
            raise UsageError(
                f"domain {domain!r}: {file} line {number} is not JSON: {error.msg}",
                path=file,
                hint="one JSON object a line",
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UsageError(
                f'domain {domain!r}: {file} line {number} has no "text" string',
                path=file,
                hint='{"text": "..."} a line',
            )
        yield Document(f"{name}:{number}", row["text"])


def passages(document: Document) -> list[Document]:
    """Divide one long text at blank lines into passages of about 4,000 characters (a text without borders inside)."""
    blocks = [block for block in re.split(r"\n[ \t]*\n", document.text) if block.strip()]
    # A block without any blank line can be a book: cut it hard.
    pieces = [b[i : i + PASSAGE_CHARS] for b in blocks for i in range(0, len(b), PASSAGE_CHARS)]
    texts: list[str] = []
    for piece in pieces:
        if texts and len(texts[-1]) + len(piece) <= PASSAGE_CHARS:
            texts[-1] += "\n\n" + piece
        else:
            texts.append(piece)
    return [Document(f"{document.name} [{i}]", text) for i, text in enumerate(texts, 1)]
