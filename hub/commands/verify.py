"""``hub verify``."""

from __future__ import annotations

from pathlib import Path

import click

from hub.commands._output import json_option, print_json, say


@click.command()
@click.argument("target", metavar="[REF|DIR]", required=False)
@json_option
@click.pass_context
def verify(ctx: click.Context, target: str | None, as_json: bool) -> None:
    """Read every byte and say what is damaged; exit 1 if anything is.

    One artifact, an artifact directory against its module.json, or without an argument the whole store: every
    blob, the log's hash chain, and whether the index agrees with it.
    """
    from hub.store import Problem, Store

    store = Store()
    if target is not None and Path(target).is_dir():
        from hub.errors import HubError
        from hub.pack import check_directory

        try:
            check_directory(Path(target))
            problems = []
        except HubError as error:
            problems = [Problem(target, error.message)]
        checked = target
    else:
        problems = store.verify(target)
        checked = target or store.where
    if as_json:
        found = [{"about": problem.about, "message": problem.message} for problem in problems]
        print_json({"checked": checked, "ok": not problems, "problems": found})
    elif not problems:
        say(f"{checked}: every byte is right")
    else:
        for problem in problems:
            click.echo(str(problem))
        say(f"{len(problems)} problem{'s' * (len(problems) > 1)}; pull or push the artifact again to mend it")
    if problems:
        ctx.exit(1)
