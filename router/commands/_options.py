"""What the verbs share: options, names for files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hub.console.options import quantize_option

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def base_options(function: FunctionT) -> FunctionT:
    """Add ``--base``, ``--quantize`` and ``--allow-base-drift``."""
    for option in (
        click.option("--allow-base-drift", is_flag=True, help="Accept adapters of other weights of one architecture."),
        quantize_option(),
        click.option(
            "--base", metavar="BASE", help="builtin:tiny-lm, a directory or a Hugging Face id [the members' own]."
        ),
    ):
        function = option(function)
    return function


def text_options(function: FunctionT) -> FunctionT:
    """Add ``--max-rows`` and ``--max-length``."""
    for option in (
        click.option("--max-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a row."),
        click.option("--max-rows", type=click.IntRange(1), default=500, show_default=True, help="Rows of each file."),
    ):
        function = option(function)
    return function


def named_files(pairs: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE`` of a command line as a mapping."""
    from hub.errors import UsageError

    files: dict[str, Path] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise UsageError(f"{pair!r} does not say whose texts these are", hint="write --data NAME=FILE")
        if name in files:
            raise UsageError(f"--data gives {name!r} twice")
        files[name] = Path(file)
    return files
