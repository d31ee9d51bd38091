"""``hub compose check``."""

from __future__ import annotations

from typing import Any

import click

from compose.commands._options import adapter_option, base_options, expression
from hub.console.output import json_option, print_json, say, warn


@click.command()
@click.argument("expr")
@base_options
@adapter_option
@json_option
@click.pass_context
def check(ctx: click.Context, /, expr: str, adapters: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Say whether a composition works on a base; nothing is loaded.

    Exit 0: it works. 1: it does not, and the message shows where. 2: EXPR cannot be read.

    Checked are the text, that all adapters are there and made for one base and for this one, that the functions fit
    the kinds, that every tensor has its place, and that each site can carry what acts there.
    """
    from compose.planning.members import assignments
    from compose.verbs import check as examine
    from hub.errors import HubError

    try:
        checked = examine(expression(expr), adapters=assignments(adapters), **options)
    except HubError as error:
        if not as_json:
            raise
        print_json({"ok": False, **error.as_dict()})
        ctx.exit(error.exit_code)
    if as_json:
        facts = {"expression": checked.text, "normal": str(checked.plan.expression), "digest": checked.plan.digest}
        print_json({"ok": True, **facts, "base": checked.outline.name, "warnings": list(checked.warnings)})
        return
    for warning in checked.warnings:
        warn(warning)
    count = len(checked.plan.leaves)
    say(
        f"{checked.plan.expression} works on {checked.outline.name}: "
        f"{count} adapter{'s' * (count != 1)}, every tensor fits"
    )
