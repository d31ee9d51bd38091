"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
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
