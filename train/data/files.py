"""Files to rows: jsonl, json, csv, tsv, parquet and text, each problem named with its file and line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from train.errors import DataError

__all__ = ["Part", "file_digests", "read_rows"]

log = logging.getLogger(__name__)
Row = dict[str, Any]
Part = Literal["all", "train", "eval", "test"]
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("eval", "evaluation", "dev", "valid", "validation", "val", "heldout"), "eval"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_CHUNK = 1 << 20
_HUB = "hf:"


def read_rows(path: str | Path, *, part: Part = "all", without: str | Path | None = None) -> list[Row]:
    """Rows of a file, or of the files of a folder in the order of their paths.

    `.jsonl`/`.json` (objects), `.csv`/`.tsv` (a header line), `.parquet`; any other file must be UTF-8 text and
    is one row `{"text": ...}`, so a folder of documents needs no preparation. `hf:NAME[@CONFIG][:SPLIT]` is a data set
    of the Hugging Face Hub, or of a folder, as the `datasets` library reads it (split train unless named).

    Parameters
    ----------
    part
        Of a folder that holds files for training and others to measure on, as their names say (`test.jsonl`,
        `valid/part-1.parquet`): which of them. Without names that tell them apart a folder is read whole.
    without
        A file or folder that is left out: what is measured on is not trained on.

    Raises
    ------
    DataError
        The path does not exist, is empty or binary, or a line cannot be read (file and line number); or all of a
        folder is left out.
    """
    if str(path).startswith(_HUB):
        return _hub_rows(str(path))
    path = Path(path)
    rows: list[Row] = []
    for file in _files(path, part, without, tell=True):
        rows += _READERS.get(file.suffix.lower(), _text)(file)
    if not rows:
        raise DataError(f"{path} holds no rows", path=path)
    return rows


def file_digests(path: str | Path, *, part: Part = "all", without: str | Path | None = None) -> dict[str, str]:
    """File name (below the folder) -> `sha256:...` of its bytes, for every file that `read_rows` reads.

    Of a data set of the Hub: its name -> the digest of its rows as JSON lines.
    """
    if str(path).startswith(_HUB):
        digest = hashlib.sha256()
        for row in _hub_rows(str(path)):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return {str(path).rsplit("/", 1)[-1]: "sha256:" + digest.hexdigest()}
    path = Path(path)
    files = _files(path, part, without)
    return {(file.relative_to(path).as_posix() if file != path else file.name): _sha256(file) for file in files}


def _hub_rows(text: str) -> list[Row]:
    """Rows of a data set by the `datasets` library."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"{text} needs the datasets library", hint="pip install datasets") from error
    name, colon, split = text.removeprefix(_HUB).rpartition(":")
    name, split = (name, split) if colon else (split, "train")
    name, _, config = name.partition("@")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "hf:NAME[@CONFIG][:SPLIT], such as hf:imdb:train"
        raise DataError(f"{text} cannot be read: {first}", hint=hint) from error
    rows: list[Row] = [dict(row) for row in dataset]
    if not rows:
        raise DataError(f"{text} holds no rows")
    return rows


def _files(path: Path, part: Part, without: str | Path | None, *, tell: bool = False) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path)))
        if not files:
            raise DataError(f"{path} is a folder without files", path=path)
        return _of_part(path, files, part, Path(without) if without is not None else None, tell)
    if not path.is_file():
        raise DataError(f"no such file: {path}", path=path, hint=f"paths are looked up from {Path.cwd()}")
    return [path]


def _of_part(path: Path, files: list[Path], part: Part, without: Path | None, tell: bool) -> list[Path]:
    """Those of a folder's files that are for `part`, without what is left out; in a log, which are left out."""
    rest = [f for f in files if without is None or not f.resolve().is_relative_to(without.resolve())]
    splits = {file: _split(file.relative_to(path)) for file in rest}
    # Documents are called anything; what holds rows, or stands beside a file to train on, is called what it is for.
    named = "train" in splits.values() or any(s and f.suffix.lower() in _READERS for f, s in splits.items())
    chosen = rest
    if part != "all" and named:
        order = {"train": ("train", ""), "eval": ("eval", "test"), "test": ("test", "eval")}[part]
        by_split = [[f for f in rest if splits[f] == split] for split in order]
        measured = next((files for files in by_split if files), rest)
        chosen = sorted(by_split[0] + by_split[1]) if part == "train" else measured
    if not chosen:
        hint = "name the file itself, or another folder"
        raise DataError(f"{path}: every file is held out, by its name or by data.eval", path=path, hint=hint)
    out = [f for f in files if f not in set(chosen)]
    if out and tell:
        shown = ", ".join(f.relative_to(path).as_posix() for f in out[:5]) + (", ..." if len(out) > 5 else "")
        log.warning("%s: %s left out of the rows %s", path, shown, "to train on" if part == "train" else "measured on")
    return chosen


def _split(relative: Path) -> str:
    """Which split a file is of, by the words of its name or of its folders'; "" where none says."""
    for name in (relative.stem, *reversed(relative.parts[:-1])):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def _read_text(path: Path) -> str:
    """UTF-8 text, or an error that says why it is not."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", path=path) from error
    if not data.strip():
        raise DataError(f"{path} is empty", path=path)
    if b"\0" in data:
        raise DataError(f"{path} is binary (a NUL byte at offset {data.index(0)})", path=path, hint="give UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start})"
        raise DataError(message, path=path, hint=f"iconv -t utf-8 {path.name}") from error


def _text(path: Path) -> list[Row]:
    return [{"text": _read_text(path)}]


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_object(_json(line, f"{path}, line {number}", path), f"{path}, line {number}", path))
    return rows


def _json_array(path: Path) -> list[Row]:
    values = _json(_read_text(path), str(path), path)
    if not isinstance(values, list):
        raise DataError(f"{path} is not a JSON array of objects", path=path, hint="one object a line goes in a .jsonl")
    return [_object(value, f"{path}, item {number}", path) for number, value in enumerate(values, 1)]


def _json(text: str, where: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})", path=path) from error


def _object(value: Any, where: str, path: Path) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object", path=path)
    return value


def _csv(path: Path) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    return list(_csv_rows(reader, path))


def _csv_rows(reader: csv.DictReader[str], path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise DataError(f"{path}, line {reader.line_num}: not {columns} cells as in the header", path=path)
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}", path=path) from error


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs pyarrow to be read", path=path, hint="pip install pyarrow") from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}", path=path) from error
    return rows


_READERS = {".jsonl": _jsonl, ".json": _json_array, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
