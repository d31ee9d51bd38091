"""``hub route explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.console.output import json_option, print_json, say
from router.commands._options import base_options, load_with_members

if TYPE_CHECKING:
    from torch import Tensor


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
    from router.artifact import load
    from router.evaluation.pictures import heatmap, in_terminal, legend, page

    stored = load(router)
    pieces, weights = _weights(stored, _text(text), given)
    experts, rows = list(stored.router.experts), weights.tolist()
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
    from router.evaluation.texts import read_texts

    return "\n\n".join(row.text for row in read_texts(text[1:]))


def _weights(stored: Any, text: str, given: dict[str, Any]) -> tuple[list[str], Tensor]:
    """Tokens as text, and the weights of the experts for each (T, E)."""
    from hub.errors import UsageError
    from router.bench import Batch
    from router.evaluation.texts import encode

    model, tokenizer = load_with_members(stored.artifacts, given)
    rows = encode(tokenizer, [text], most=given["max_length"])
    if not rows:
        raise UsageError("the text has fewer than two tokens", hint="give a longer one")
    batch = Batch.of(rows, tasks=(given["task"],) if given["task"] else ()).to(model.device)
    pieces = [tokenizer.decode([token]) for token in rows[0].tolist()]
    return pieces, _posterior(stored.router, model, batch) if stored.router.scorer.name == "likelihood" else (
        stored.router.token_weights(model, batch)[0].float().cpu()
    )


def _posterior(router: Any, model: Any, batch: Any) -> Tensor:
    """The posterior after each token (T, E): before the first one it is the prior."""
    import torch

    from router.ensemble.demix import Ensemble

    options = router.scorer.options
    ensemble = Ensemble(
        model,
        list(router.experts.values()),
        gamma=options.gamma,
        temperature=router.gating.temperature,
        hedge=options.hedge,
    )
    score = ensemble.score(batch.input_ids, batch.attention_mask)
    return torch.cat([score.posterior[0], score.final]).float().cpu()
