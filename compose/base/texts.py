"""Texts from files: JSONL rows with a text and perhaps a label, or plain text, a paragraph a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.errors import HubError, NotFound

if TYPE_CHECKING:
    from torch import Tensor

MAX_LINE = 4 * 2**20  # characters of one row


@dataclass(frozen=True)
class Text:
    """One row: what it says, and its label where it has one."""

    text: str
    label: str | None = None


def read_texts(path: str | Path, *, most: int | None = None) -> list[Text]:
    """Rows of a file, at most `most`.

    A ``.jsonl`` or ``.json`` file has an object a line: ``text`` is the text, else all its strings but ``label``, one a
    line. Of any other file each paragraph is a row.

    Raises
    ------
    NotFound, HubError
        No such file, a line that is no JSON object with text, a row of more than 4 Mi characters, an empty file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise NotFound(f"there is no file {path}", path=path, hint="check the path")
    try:
        whole = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise HubError(f"{path} is not UTF-8 text: byte {error.start}", path=path) from None
    if path.suffix in (".jsonl", ".json"):
        numbered = [(number, line) for number, line in enumerate(whole.splitlines(), 1) if line.strip()]
        rows = [_row(path, number, line) for number, line in numbered[:most]]
    else:
        rows = [Text(part.strip()) for part in whole.split("\n\n") if part.strip()][:most]
    if not rows:
        raise HubError(f"{path} holds no text", path=path, hint='rows are {"text": "..."}, or plain text')
    return rows


def _row(path: Path, number: int, line: str) -> Text:
    where = f"{path}, line {number}"
    if len(line) > MAX_LINE:
        raise HubError(f"{where} has {len(line)} characters; at most {MAX_LINE}", path=path)
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise HubError(f"{where} is not JSON: {error}", path=path) from None
    except RecursionError:
        raise HubError(f"{where} is nested too deep", path=path) from None
    if not isinstance(fields, dict):
        raise HubError(f"{where} is no object", path=path, hint='rows are {"text": "..."}')
    text = fields.get("text")
    if text is None:
        text = "\n".join(str(v) for k, v in fields.items() if k != "label" and isinstance(v, str))
    if not isinstance(text, str) or not text.strip():
        raise HubError(f"{where} has no text", path=path, hint='rows are {"text": "..."}')
    label = fields.get("label")
    return Text(text, None if label is None else str(label))


def encode(tokenizer: Any, texts: Sequence[str], *, most: int) -> list[Tensor]:
    """Token ids (T,) of each text, cut to `most` tokens; texts of fewer than two tokens are left out."""
    import torch

    rows = [torch.tensor(tokenizer(text, truncation=True, max_length=most).input_ids) for text in texts]
    return [row.long() for row in rows if len(row) > 1]
