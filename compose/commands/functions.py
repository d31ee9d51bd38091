"""``hub compose functions``."""

from __future__ import annotations

import click

from hub.console.output import columns, json_option, print_json


@click.command()
@click.argument("name", required=False)
@json_option
def functions(name: str | None, as_json: bool) -> None:
    """List the functions of the algebra; with NAME, the options of one.

    A merge folds adapters into a new one in parameter space, a route weighs them per row or token, an ensemble mixes
    output probabilities.
    """
    from compose.inspection.descriptions import describe_functions

    facts = describe_functions(name)
    if as_json:
        print_json(facts)
    elif name is not None:
        (one,) = facts
        click.echo(f"{one['name']}: {one['summary']}\n{one['family']} of {one['adapters']}\n")
        options = [(o["name"], o["type"], o["default"], o["description"]) for o in one["options"]]
        click.echo(columns(("OPTION", "TYPE", "DEFAULT", "MEANING"), options) if options else "It has no options.")
    else:
        table = [(f["name"], f["family"], ", ".join(o["name"] for o in f["options"]), f["summary"]) for f in facts]
        click.echo(columns(("FUNCTION", "FAMILY", "OPTIONS", "WHAT IT IS"), table))
