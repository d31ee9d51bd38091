"""Options that commands of several packages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from hub.lazy import load

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def quantize_option(
    text: str = "How the base is held [as its adapters were trained].", *, default: str | None = None
) -> Callable[[FunctionT], FunctionT]:
    """Add ``--quantize``, which takes a name of ``compose.base.request.QUANTIZATIONS``."""
    names = click.Choice(list(load("compose.base.request:QUANTIZATIONS")))
    return click.option("--quantize", type=names, default=default, show_default=default is not None, help=text)
