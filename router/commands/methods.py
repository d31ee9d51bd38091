"""``hub route methods``."""

from __future__ import annotations

import click

from hub.console.output import columns, json_option, print_json


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the routing methods: what each weighs, what it needs, its options and its paper."""
    from router.scorer import SCORERS

    rows = [
        {
            "method": name,
            "weighs": "rows" if cls.level == "row" else "tokens at sites",
            "needs": "texts" if cls.needs_data else "no data",
            "adds": "all again" if cls.joint else "one alone",
            "options": {key: field.description for key, field in cls.Options.model_fields.items()},
            "paper": cls.paper,
            "formula": (cls.__doc__ or "").strip().splitlines()[0].replace("`", ""),
        }
        for name, cls in SCORERS.all().items()
    ]
    if as_json:
        print_json(rows)
        return
    header = ("METHOD", "WEIGHS", "NEEDS", "ADDS A MEMBER BY FITTING", "OPTIONS", "PAPER")
    keys = ("method", "weighs", "needs", "adds", "options", "paper")
    click.echo(
        columns(header, [[", ".join(v) if isinstance(v := row[k], dict) else str(v) for k in keys] for row in rows])
    )
