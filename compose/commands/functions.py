"""``hub compose functions``."""

from __future__ import annotations

from typing import Any

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
    facts = rows(name)
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


def rows(name: str | None = None) -> list[dict[str, Any]]:
    """Facts of all functions, or of the one called ``name``, from the registry."""
    from compose.function import functions as known
    from compose.function import get_function

    specs = [get_function(name)] if name is not None else list(known().values())
    return [
        {
            "name": spec.name,
            "family": spec.family,
            "summary": spec.summary,
            "adapters": _amount(spec.minimum, spec.maximum),
            "options": fields(spec.options),
        }
        for spec in specs
    ]


def _amount(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} or more adapters"
    return f"{low} adapter{'s' * (low != 1)}" if low == high else f"{low} to {high} adapters"


def fields(model: Any) -> list[dict[str, str]]:
    """Options of a pydantic model: name, type, default and description."""
    options = []
    for name, entry in model.model_fields.items():
        default = entry.get_default(call_default_factory=True)
        options.append(
            {
                "name": entry.alias or name,
                "type": _type(entry.annotation),
                "default": "required" if entry.is_required() else "none" if default is None else _plain(default),
                "description": entry.description or "",
            }
        )
    return options


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "[]" if value == () else str(value)


def _type(annotation: Any) -> str:
    """A type as people write it: ``int``, ``list of float``, ``paper | peft``."""
    import types
    from typing import Literal, Union, get_args, get_origin

    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(a) for a in args if a is not type(None)))
    if origin is tuple:
        return f"list of {_type(args[0])}"
    return getattr(annotation, "__name__", str(annotation))
