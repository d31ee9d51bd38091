"""Progress of long work on stderr: a bar for people, silence for pipes and scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int], Callable[[int], None]]
"""Called with a label and a total of bytes; gives the function that is told of every count of bytes done."""


def quiet(_label: str, _total: int) -> Callable[[int], None]:
    """Show nothing."""

    def advance(_count: int) -> None:
        """Do nothing."""

    return advance


@contextmanager
def bars() -> Iterator[Progress]:
    """Show a rich progress bar on stderr where that is a terminal; `quiet` otherwise."""
    if not sys.stderr.isatty():
        yield quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:

        def start(label: str, total: int) -> Callable[[int], None]:
            if not total:  # all is there already
                return quiet(label, total)
            task = shown.add_task(label, total=total)
            return lambda count: shown.advance(task, count)

        yield start


Steps = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and of how many."""


@contextmanager
def steps_bar() -> Iterator[Steps | None]:
    """Show a bar of (what, done, total) on stderr where that is a terminal; None, which shows nothing, otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress as Bar

    with Bar(*Bar.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as shown:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield step
