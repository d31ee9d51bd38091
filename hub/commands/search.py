"""``hub search``."""

from __future__ import annotations

from typing import Any

import click

from hub.commands._options import filters
from hub.commands._output import documents, json_option, print_json, say, table


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="TEXT")
@filters
@click.option("--all-versions", is_flag=True, help="Every version, not the newest of each name alone.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most this many.")
@json_option
def search(
    words: tuple[str, ...],
    metric: str | None,
    all_versions: bool,
    limit: int,
    as_json: bool,
    **asked: Any,
) -> None:
    """Find artifacts whose name, summary, kind, task, base or labels hold all words; the best match first.

    \b
    hub search legal summaries --base builtin:tiny-lm
    hub search sentiment --task classification --metric 'accuracy>=0.8'

    A word matches its beginning, too: sent finds sentiment. With --metric, the best by it come first.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import re

    from hub.store import Store

    store, text = Store(), " ".join(words)
    name = re.split("[<>]", metric)[0].strip() if metric else None
    if name is None:
        artifacts = store.search(text, limit=limit, newest=not all_versions, **asked)
    else:
        artifacts = store.list(text=text, sort=name, limit=limit, newest=not all_versions, metric=metric, **asked)
    if as_json:
        print_json(documents(store, artifacts, name))
    elif artifacts:
        click.echo(table(store, artifacts, name))
    else:
        say(f"nothing in {store.where} fits" if store.names() else f"{store.where} is empty; `hub push DIR` fills it")
