"""``hub route like``."""

from __future__ import annotations

import click

from hub.console.output import columns, json_option, print_json


@click.command()
@click.argument("file", type=click.Path())
@click.option("--limit", type=click.IntRange(1), default=10, show_default=True, help="How many to list.")
@json_option
def like(file: str, limit: int, as_json: bool) -> None:
    """Rank the store's adapters for the text of FILE (JSONL or plain) by their word statistics, without their weights.

    The score is in nats a word above what all of them together say of the text: above 0 fits, below does not.
    """
    from compose.base.texts import read_texts
    from hub.errors import NotFound
    from router.evaluation.similar import rank

    ranked = rank("\n".join(row.text for row in read_texts(file, most=1000)))
    if not ranked:
        raise NotFound(
            "no adapter of the store carries word statistics",
            hint="a router that was fitted on texts carries those of its members: hub route fit --data NAME=FILE",
        )
    if as_json:
        print_json([{"ref": ref, "score": score} for ref, score in ranked[:limit]])
    else:
        click.echo(columns(("ADAPTER", "SCORE"), [(ref, f"{score:+.3f}") for ref, score in ranked[:limit]]))
