"""What the verbs share: options, a base with a router's members on it, a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hub.console.options import quantize_option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Told = Callable[[str, int, int], None]


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


def load_with_members(members: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """The base with artifacts resident under their names, and its tokenizer; `given` holds the `base_options`."""
    import compose
    from compose.base.at_hand import at_hand
    from hub.errors import UsageError

    facts = [artifact.manifest for artifact in members.values()]
    base = given["base"] or next((at_hand(m.base) for m in facts if m.base is not None), None)
    if base is None:
        raise UsageError("nothing says which base the members were made for", hint="--base BASE")
    tasks = {m.task for m in facts if m.task}
    task = tasks.pop() if len(tasks) == 1 else None
    labels = (facts[0].labels or None) if task == "classification" else None
    model = compose.load(base, quantize=given["quantize"], task=task, labels=labels)
    for name, artifact in members.items():
        compose.attach(model, name, artifact, allow_base_drift=given["allow_base_drift"]).freeze()
    return model, compose.tokenizer(base)


@contextmanager
def bar() -> Iterator[Told | None]:
    """Show a bar of (what, done, total) on stderr where that is a terminal; None otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as shown:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield told
