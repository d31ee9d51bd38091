"""``hub route explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hub.console.output import json_option, print_json, say
from router.commands._options import base_options


@click.command()
@click.argument("router", metavar="ROUTER")
@click.option("--text", required=True, help="The text; @FILE reads it from a file.")
@click.option("--max-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens that are read.")
@click.option("--task", metavar="NAME", help="The member that the text asks for, where the router needs that.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page with the weights of every token.")
@click.option("--svg", type=click.Path(dir_okay=False), help="Write the weights as a heatmap.")
@base_options
@json_option
def explain(router: str, text: str, html: str | None, svg: str | None, as_json: bool, **given: Any) -> None:
    """Show which adapters answer which tokens of a text: each token in the colour of the one that weighs most.

    Weights are means over the sites for routers that choose at each site, and those of the whole row for routers that
    choose by row; of a likelihood router they are its posterior as the text is read.
    """
    from router.api import explain as explain_router
    from router.evaluation.pictures import heatmap, in_terminal, legend, page

    explained = explain_router(router, _text(text), **given)
    pieces, experts, weights = explained.tokens, explained.experts, explained.weights
    rows = weights.tolist()
    if html:
        Path(html).write_text(page(router, pieces, experts, rows), encoding="utf-8")
        say(f"wrote {html}")
    if svg:
        shown = [f"{i} {piece.strip()}" for i, piece in enumerate(pieces)]
        Path(svg).write_text(heatmap(f"{router}: weights by token", shown, experts, rows), encoding="utf-8")
        say(f"wrote {svg}")
    if as_json:
        tokens = [
            {"token": p, "weights": dict(zip(experts, w, strict=True))} for p, w in zip(pieces, rows, strict=True)
        ]
        print_json({"router": router, "experts": experts, "tokens": tokens})
        return
    share, best = weights.max(-1)
    click.echo(in_terminal(pieces, best.tolist(), share.tolist()))
    click.echo()
    click.echo(legend(experts, weights.mean(0).tolist()))


def _text(text: str) -> str:
    if not text.startswith("@"):
        return text
    from compose.base.texts import read_texts

    return "\n\n".join(row.text for row in read_texts(text[1:]))
