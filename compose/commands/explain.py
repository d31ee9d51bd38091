"""``hub compose explain``."""

from __future__ import annotations

from typing import Any

import click

from compose.commands._options import adapter_option, base_options, expression
from hub.console.output import print_json


@click.command()
@click.argument("expr")
@base_options
@adapter_option
@click.option(
    "--format", "form", type=click.Choice(["text", "dot", "json"]), default="text", show_default=True, help="Of stdout."
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def explain(expr: str, adapters: tuple[str, ...], form: str, as_json: bool, **options: Any) -> None:
    """Show plan, requirements, memory and cost of a composition, before anything is loaded.

    \b
    hub compose explain 'acme/tone >> 0.5 * acme/law' --base builtin:tiny-lm --quantize nf4
    hub compose explain 'average(acme/tone, acme/law)' --format dot | dot -Tsvg > plan.svg

    What `hub compose check` refuses is refused here too, in the same way. Costs are operations in matrix products,
    counted on the shapes of the base with a text of 128 tokens.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from compose.inspection.explain_text import as_dot, as_text
    from compose.planning.members import assignments
    from compose.verbs import explain as examine

    explanation = examine(expression(expr), adapters=assignments(adapters), **options)
    if as_json or form == "json":
        print_json(explanation.as_dict())
    else:
        click.echo(as_dot(explanation.plan) if form == "dot" else as_text(explanation))
