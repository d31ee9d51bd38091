"""Answers as CSV, TSV or Parquet, made of the finished rows as JSON lines, in two passes over them.

A table needs to know all its columns before its first row, so while a run is under way its rows are JSON lines beside
the output (`OUT.rows`); the table is a function of them, whatever interrupted the run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from hub.contents.rows import format_of
from hub.errors import UsageError
from hub.io.files import fsync_directory

TABLES = {".csv": ",", ".tsv": "\t", ".parquet": ""}
_GROUP = 8192  # rows of a Parquet row group
Row = dict[str, Any]


def is_table(out: Path) -> bool:
    """Whether an output is a table. Raises UsageError where it cannot be written."""
    form = format_of(out)
    if form in TABLES and out.suffix.lower() == ".gz":
        raise UsageError(
            f"{out}: tables are written plain", path=out, hint=f"--out {out.with_suffix('')}, or .jsonl.gz"
        )
    if form == ".json":
        raise UsageError(f"{out}: rows are written one a line", path=out, hint=f"--out {out.with_suffix('.jsonl')}")
    if form == ".parquet":
        _pyarrow(out)
    return form in TABLES


def write_table(rows: Path, out: Path, *, source: Path | None, into: str) -> None:
    """Write a table whole or not at all.

    Parameters
    ----------
    rows
        JSON lines.
    source
        The input: columns of a Parquet file keep their types in another one.
    into
        Names of the columns that were added begin with it.
    """
    form, columns = format_of(out), list(dict.fromkeys(name for row in _read(rows) for name in row))
    with _whole(out) as young:
        if form != ".parquet":
            _write_cells(young, rows, columns, TABLES[form])
        elif source is not None and format_of(source) == ".parquet":
            _write_beside(young, rows, source, [c for c in columns if c == into or c.startswith(into + "_")])
        else:
            _write_parquet(young, rows, columns)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    young = out.with_name(f".{out.name}.young.tmp")
    try:
        yield young
        young.replace(out)
    finally:
        young.unlink(missing_ok=True)
    fsync_directory(out.parent)


def _read(rows: Path) -> Iterator[Row]:
    with rows.open("rb") as file:
        yield from map(json.loads, file)


def _write_cells(out: Path, rows: Path, columns: Sequence[str], separator: str) -> None:
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(name)) for name in columns] for row in _read(rows))


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _write_parquet(out: Path, rows: Path, columns: Sequence[str]) -> None:
    pyarrow = _pyarrow(out)
    schema = _schema(pyarrow, rows, columns)
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for group in _groups(_read(rows)):
            writer.write_table(_table(pyarrow, group, schema))


def _write_beside(out: Path, rows: Path, source: Path, added: Sequence[str]) -> None:
    """The input's own columns, as they were, and those that were added."""
    pyarrow = _pyarrow(out)
    schema = _schema(pyarrow, rows, added)
    file, answers = pyarrow.parquet.ParquetFile(source), _read(rows)
    whole = pyarrow.schema([*file.schema_arrow, *schema])
    with pyarrow.parquet.ParquetWriter(out, whole) as writer:
        for batch in file.iter_batches(batch_size=_GROUP):
            own = _table(pyarrow, list(islice(answers, batch.num_rows)), schema)
            writer.write_table(pyarrow.Table.from_arrays([*batch.columns, *own.columns], schema=whole))


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while group := list(islice(rows, _GROUP)):
        yield group


def _schema(pyarrow: Any, rows: Path, columns: Sequence[str]) -> Any:
    """A type for each column that holds all its values; JSON as text where there is none, or for objects."""
    types = dict.fromkeys(columns, pyarrow.null())
    for group in _groups(_read(rows)):
        for name in columns:
            types[name] = _wider(pyarrow, name, types[name], [row.get(name) for row in group])
    return pyarrow.schema(
        [(name, pyarrow.string() if kind == pyarrow.null() else kind) for name, kind in types.items()]
    )


def _wider(pyarrow: Any, name: str, known: Any, values: list[Any]) -> Any:
    if known == pyarrow.string() or any(isinstance(value, dict) for value in values):
        return pyarrow.string()
    try:
        found = pyarrow.schema([(name, pyarrow.array(values).type)])
        wide = pyarrow.unify_schemas([pyarrow.schema([(name, known)]), found], promote_options="permissive")
    except pyarrow.ArrowException:  # of several kinds
        return pyarrow.string()
    return wide.field(0).type


def _table(pyarrow: Any, group: Sequence[Row], schema: Any) -> Any:
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in group]
        if field.type == pyarrow.string():
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        columns.append(pyarrow.array(values, type=field.type))
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _pyarrow(out: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UsageError(f"{out} needs pyarrow to be written", path=out, hint="pip install pyarrow") from error
    return pyarrow
