"""What commands print: data on stdout, chatter on stderr, JSON where a script asks for it. Every package uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
WIDTH = 80  # columns of a table


def json_option(function: FunctionT) -> FunctionT:
    """Add ``--json``, given to the command as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")(function)


def json_file_option(function: FunctionT) -> FunctionT:
    """Add ``--json FILE``, given to the command as ``json_path``; a place that cannot be written is refused at once."""
    help_text = "Write the result as JSON; - is stdout."
    return click.option("--json", "json_path", metavar="FILE", callback=_writable, help=help_text)(function)


def _writable(_ctx: click.Context, _option: click.Parameter, path: str | None) -> str | None:
    if path not in (None, "-"):
        place = Path(path).absolute()
        there = next(p for p in (place, *place.parents) if p.exists())
        if there.is_dir() is (there == place) or not os.access(there, os.W_OK):
            raise click.BadParameter(f"{path} cannot be written: {there} is in the way")
    return path


def write_json(value: object, path: str | None) -> None:
    """Write one JSON document to a file, whose folder is made, or print it where the path is ``-``; None: neither."""
    if path == "-":
        print_json(value)
    elif path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_json(value: object) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Chatter: to stderr, so that stdout holds data alone."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    click.secho("warning: ", fg="yellow", nl=False, err=True)
    click.echo(text, err=True)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in aligned columns, two spaces apart; the same bytes on a terminal and in a pipe."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def fitted(header: Sequence[str], rows: Iterable[Sequence[str]], cut: Iterable[str], *, width: int = WIDTH) -> str:
    """As `columns`, within a width: columns without a cell are left out, then the widest of those in ``cut`` gives way.

    Cells of other columns stay whole, as what one copies into the next command must.
    """
    table = [list(header), *(list(row) for row in rows)]
    table = [list(row) for row in zip(*(col for col in zip(*table, strict=True) if any(col[1:])), strict=True)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = {i: len(name) for i, name in enumerate(table[0]) if name in set(cut)}  # never narrower than the heading
    while sum(widths) + 2 * (len(widths) - 1) > width and any(widths[i] > least for i, least in room.items()):
        widths[max((i for i in room if widths[i] > room[i]), key=widths.__getitem__)] -= 1
    return columns(table[0], [_cut(row, widths) for row in table[1:]])


def _cut(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Cells that are too long lose their beginning: the name of a model is at its end."""
    fits = zip(row, widths, strict=True)
    return [cell if len(cell) <= room else f"…{cell[len(cell) - room + 1 :]}" for cell, room in fits]


def bytes_text(count: int) -> str:
    """``1.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
