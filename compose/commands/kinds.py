"""``hub compose kinds``."""

from __future__ import annotations

import sys
from typing import Any

import click

from compose.commands.functions import fields
from hub.console.output import columns, json_option, print_json


@click.command()
@click.argument("name", required=False)
@json_option
def kinds(name: str | None, as_json: bool) -> None:
    """List the kinds of adapters; with NAME, the options of one.

    PEFT is the type under which PEFT reads and writes it, where it has the kind.
    """
    facts = rows(name)
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


def rows(name: str | None = None) -> list[dict[str, Any]]:
    """Facts of all kinds, or of the one called ``name``, from the registry."""
    from compose.kind.registry import get_kind
    from compose.kind.registry import kinds as known

    classes = [get_kind(name)] if name is not None else list(known().values())
    return [
        {
            "kind": cls.kind,
            "what": _first(sys.modules[cls.__module__].__doc__),
            "formula": _first(cls.__doc__),
            "paper": cls.paper,
            "peft_type": cls.peft_type,
            "default_targets": list(cls.default_targets),
            "options": fields(cls.Config),
        }
        for cls in classes
    ]


def _first(doc: str | None) -> str:
    """First paragraph of a docstring, on one line."""
    return " ".join((doc or "").strip().split("\n\n")[0].split()).replace("``", "`")


def _own(row: dict[str, Any]) -> list[str]:
    """Options that not every kind has."""
    from compose.kind.adapter import KindConfig

    return [option["name"] for option in row["options"] if option["name"] not in KindConfig.model_fields]
