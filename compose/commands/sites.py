"""``hub compose sites``."""

from __future__ import annotations

from typing import Any

import click

from hub.console.output import columns, json_option, print_json, say


@click.command()
@click.argument("base")
@click.option("--task", help="Head of the base: causal_lm, classification, ... [as it was saved].")
@click.option("--brief", is_flag=True, help="One line a role instead of one a site.")
@json_option
def sites(base: str, task: str | None, brief: bool, as_json: bool) -> None:
    """List the sites of a base: neutral name, path, shape, and how each was recognised.

    \b
    hub compose sites builtin:tiny-lm
    hub compose sites ./my-model --brief

    Adapters are aimed at roles (attn.q), at ends of paths (q_proj), at whole names and paths, or at all-linear. Sites
    outside the blocks, and the parts of a fused layer (q of GPT-2's c_attn), are acted on only where a target names
    them. Only config.json of the base is read.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from compose.inspection.descriptions import describe_sites

    found = describe_sites(base, task)
    if as_json:
        print_json(found)
        return
    facts, family = found["sites"], found["model_type"] or "unknown type"
    known = "in the table of families" if found["known_family"] else "not in the table: sites are told by their names"
    say(f"{found['base']}: {found['architecture']} ({family}, {known}), {found['layers']}")
    table = _by_role(facts) if brief else [(r["name"], r["path"], f"{r['in']} -> {r['out']}", r["why"]) for r in facts]
    click.echo(columns(("ROLE" if brief else "SITE", "PATH", "SHAPE", "HOW IT IS KNOWN"), table))


def _by_role(facts: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    import re

    roles: dict[tuple[str, str, str, str], None] = {}
    for row in facts:
        path = re.sub(r"\.\d+(?=\.)", ".*", row["path"])
        name = f"{row['stack']}.{row['role']}" if row["stack"] else row["role"]
        roles[name, path, f"{row['in']} -> {row['out']}", row["why"]] = None
    return list(roles)
