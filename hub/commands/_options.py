"""Options that several commands of ``hub`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from hub.io.parallel import JOBS, MOST_JOBS

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, MOST_JOBS),
    default=JOBS,
    show_default=True,
    envvar="HUB_JOBS",
    show_envvar=True,
    help="Files that move at once, at most.",
)

_FILTERS = (
    click.option("--base", help="Made for this base (its name, or a digest)."),
    click.option("--task", help="For this task."),
    click.option("--kind", help="Of this kind: lora, ia3, ..."),
    click.option("--method", help="Learned by this method."),
    click.option("--type", help="adapter, composition, router or merge."),
    click.option("--namespace", help="In this namespace."),
    click.option("--label", help="With this label."),
    click.option("--language", help="With this language."),
    click.option("--domain", help="With this domain."),
    click.option("--license", help="Under this licence."),
    click.option("--alias", help="With this alias."),
    click.option("--metric", metavar="NAME[>=VALUE]", help="Measured by this metric, within a bound."),
)


def filters(command: CommandT) -> CommandT:
    """Options that say which artifacts are meant, called as the filters of `Store.list` are."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command
