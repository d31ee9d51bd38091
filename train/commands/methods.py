"""`hub methods`."""

from __future__ import annotations

from typing import Any

import click

from hub.console.output import columns, json_option, print_json

__all__ = ["methods"]


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the table of the docs.")
@json_option
def methods(name: str | None, markdown: bool, as_json: bool) -> None:
    """List the methods that `hub train` knows; with NAME, one method and its options.

    A method is how an adapter is learned; its kind is what the adapter is when it is applied.
    """
    from train.methods_table import describe_methods
    from train.methods_table import markdown as table

    described = describe_methods(name)
    if as_json:
        print_json(described)
    elif markdown:
        click.echo(table(described), nl=False)
    elif name is not None:
        _one(described[0])
    else:
        own = [", ".join(option["name"] for option in row["options"]) for row in described]
        rows = [(r["method"], r["kind"], o, r["paper"], r["what"]) for r, o in zip(described, own, strict=True)]
        click.echo(columns(("METHOD", "KIND", "OPTIONS", "PAPER", "WHAT IT IS"), rows))


def _one(row: dict[str, Any]) -> None:
    click.echo(f"{row['method']}: {row['what']}")
    for text in (row["more"], f"{row['kind']}, {row['paper']}" if row["paper"] else row["kind"]):
        if text:
            click.echo(text)
    for title, values in (("sets of its kind", row["defaults"]), ("sets of the run, unless given", row["recipe"])):
        if values:
            click.echo(f"{title}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
    if row["options"]:
        rows = [(o["name"], str(o["default"]), o["description"]) for o in row["options"]]
        click.echo("\n" + columns(("OPTION", "DEFAULT", "MEANING"), rows))
    if ">>" not in row["kind"]:
        click.echo(f"\noptions of the kind: hub compose kinds {row['kind']}")
