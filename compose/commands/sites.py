"""``hub compose sites``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hub.console.output import columns, json_option, print_json, say

if TYPE_CHECKING:
    from compose.base.sites import Site
    from compose.inspection.fake_base import FakeBase


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
    from compose.inspection.fake_base import FakeBase

    outline = FakeBase(base, task=task)
    facts = rows(outline)
    if as_json:
        print_json({"base": outline.name, "model_type": outline.sites.model_type, "sites": facts, **_around(outline)})
        return
    family = outline.sites.model_type or "unknown type"
    known = (
        "in the table of families" if outline.sites.known_family else "not in the table: sites are told by their names"
    )
    say(f"{outline.name}: {outline.sites.architecture} ({family}, {known}), {outline.sites.depth()}")
    table = _by_role(facts) if brief else [(r["name"], r["path"], f"{r['in']} -> {r['out']}", r["why"]) for r in facts]
    click.echo(columns(("ROLE" if brief else "SITE", "PATH", "SHAPE", "HOW IT IS KNOWN"), table))


def rows(outline: FakeBase) -> list[dict[str, Any]]:
    """Facts of all sites, those outside the blocks last."""
    inside = [s for whole in outline.sites for s in (whole, *outline.sites.parts.get(whole.path, ()))]
    sites = [*inside, *outline.sites.outside.values()]
    facts = []
    for site in sites:
        how, why = recognised(site, outline.sites.model_type)
        facts.append(
            {
                "name": site.name,
                "role": site.role,
                "layer": site.layer,
                "stack": site.stack,
                "path": site.path,
                "in": site.in_features,
                "out": site.out_features,
                "by": how,
                "why": why,
            }
        )
    return facts


def recognised(site: Site, model_type: str) -> tuple[str, str]:
    """How a site got its role: ``table``, ``part``, ``name``, ``path`` or ``outside``, and the explanation."""
    from compose.base.families import FAMILIES, guess_role

    if site.rows is not None:
        return "part", f"part of {site.module.rsplit('.', 1)[-1]}: {site.rows}"
    if site.layer is None:
        return "outside", "outside the blocks: only where a target names it"
    table = FAMILIES.get(model_type, {})
    end = next((s for s, role in table.items() if role == site.role and f".{site.path}".endswith("." + s)), None)
    if end is not None:
        return "table", f"table of {model_type}: {end}"
    last = site.path.rsplit(".", 1)[-1]
    if guess_role(site.path) == site.role:
        return "name", f"by its name: {last} is {site.role} in other families"
    return "path", f"linear in a numbered block; {last} is no name we know"


def _around(outline: FakeBase) -> dict[str, Any]:
    sites = outline.sites
    return {
        "architecture": sites.architecture,
        "known_family": sites.known_family,
        "embedding": sites.embedding,
        "positions": list(sites.positions),
        "norms": list(sites.norms),
    }


def _by_role(facts: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    import re

    roles: dict[tuple[str, str, str, str], None] = {}
    for row in facts:
        path = re.sub(r"\.\d+(?=\.)", ".*", row["path"])
        name = f"{row['stack']}.{row['role']}" if row["stack"] else row["role"]
        roles[name, path, f"{row['in']} -> {row['out']}", row["why"]] = None
    return list(roles)
