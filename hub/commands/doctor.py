"""``hub doctor``."""

from __future__ import annotations

import click

from hub.commands._output import json_option, print_json, say

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "broken": ("broken", "red")}


@click.command()
@click.option("--offline", is_flag=True, help="Leave the remotes alone.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, /, offline: bool, as_json: bool) -> None:
    """Look for what is broken in the environment, the store and the remotes; exit 1 if anything is.

    Each problem comes with what to do. The bytes of the store are `hub verify`'s to read.
    """
    import hub

    findings = []
    for finding in hub.doctor(offline=offline):
        findings.append(finding)
        if not as_json:
            word, colour = _MARKS[finding.level]
            click.echo(f"{click.style(f'{word:<6}', fg=colour)}  {finding.area:<8} {finding.message}")
            if finding.hint and finding.level != "ok":
                click.echo(f"{'':<17}-> {finding.hint}")
    broken = sum(finding.level == "broken" for finding in findings)
    if as_json:
        print_json({"ok": not broken, "findings": [finding.as_dict() for finding in findings]})
    else:
        say(f"{broken} problem{'s' * (broken != 1)}" if broken else "all is well")
    if broken:
        ctx.exit(1)
