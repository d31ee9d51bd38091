"""Options that several verbs share, and the bar of a long merge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from hub.console.options import quantize_option

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def base_options(function: FunctionT) -> FunctionT:
    """Add ``--base``, ``--quantize``, ``--task`` and ``--allow-base-drift``."""
    for option in (
        click.option("--allow-base-drift", is_flag=True, help="Accept adapters of other weights of one architecture."),
        click.option("--task", help="Head of the base: causal_lm, classification, ... [as the adapters say]."),
        quantize_option(),
        base_option,
    ):
        function = option(function)
    return function


def base_option(function: FunctionT) -> FunctionT:
    """Add ``--base``."""
    text = "builtin:tiny-lm, a directory or a Hugging Face id [the one the adapters were made for]."
    return click.option("--base", metavar="BASE", help=text)(function)


def adapter_option(function: FunctionT) -> FunctionT:
    """Add ``--adapter NAME=DIR|REF``, given to the command as ``adapters``."""
    option = click.option(
        "--adapter", "adapters", multiple=True, metavar="NAME=DIR|REF", help="What a name of EXPR stands for (repeat)."
    )
    return option(function)


def expression(word: str) -> str:
    """Text of an expression: the word itself, or what the recipe (.json, .yaml) of that name says.

    Raises
    ------
    ExpressionError
        The recipe is none, with the place in it.
    """
    path = Path(word)
    if path.suffix not in (".json", ".yaml", ".yml") or not path.is_file():
        return word
    import yaml

    from compose.algebra import from_json
    from compose.errors import ExpressionError

    try:
        value = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ExpressionError(f"{path} is no recipe: {' '.join(str(error).split())[:200]}") from error
    return str(from_json(value))


Steps = Callable[[str, int, int], None]


@contextmanager
def steps_bar() -> Iterator[Steps | None]:
    """Show a bar of (what, done, total) on stderr where that is a terminal; None, which shows nothing, otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as shown:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield step
