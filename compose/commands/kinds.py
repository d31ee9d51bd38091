"""``hub compose kinds``."""

from __future__ import annotations

from typing import Any

import click

from hub.console.output import columns, json_option, print_json


@click.command()
@click.argument("name", required=False)
@json_option
def kinds(name: str | None, as_json: bool) -> None:
    """List the kinds of adapters; with NAME, the options of one.

    PEFT is the type under which PEFT reads and writes it, where it has the kind.
    """
    from compose.inspection.descriptions import describe_kinds

    facts = describe_kinds(name)
    if as_json:
        print_json(facts)
    elif name is not None:
        (one,) = facts
        peft = f"PEFT type {one['peft_type']}" if one["peft_type"] else "not in PEFT"
        acts = f"acts by default at {', '.join(one['default_targets'])}" if one["default_targets"] else ""
        click.echo(f"{one['kind']}: {one['what']}")
        click.echo(
            "\n".join(line for line in (one["formula"], ", ".join(filter(None, [one["paper"], peft, acts]))) if line)
        )
        options = [(o["name"], o["type"], o["default"], o["description"]) for o in one["options"]]
        click.echo("\n" + columns(("OPTION", "TYPE", "DEFAULT", "MEANING"), options))
    else:
        table = [(k["kind"], k["peft_type"] or "-", k["paper"] or "-", ", ".join(_own(k)), k["what"]) for k in facts]
        click.echo(columns(("KIND", "PEFT", "PAPER", "OPTIONS", "WHAT IT IS"), table))


def _own(row: dict[str, Any]) -> list[str]:
    """Options that not every kind has."""
    from compose.kind.adapter import KindConfig

    return [option["name"] for option in row["options"] if option["name"] not in KindConfig.model_fields]
