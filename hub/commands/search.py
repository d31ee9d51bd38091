"""``hub search``."""

from __future__ import annotations

from typing import Any

import click

from hub.commands._output import documents, json_option, print_json, say, table


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="TEXT")
@click.option("--base", help="Made for this base (its name, or a digest).")
@click.option("--kind", help="Of this kind: lora, ia3, ...")
@click.option("--task", help="For this task.")
@click.option("--method", help="Learned by this method.")
@click.option("--type", "type_", help="adapter, composition, router or merge.")
@click.option("--namespace", help="In this namespace.")
@click.option("--language", help="With this language.")
@click.option("--domain", help="With this domain.")
@click.option("--license", "license_", help="Under this licence.")
@click.option("--metric", metavar="NAME[>=VALUE]", help="Measured by this metric, within a bound; the best first.")
@click.option("--all-versions", is_flag=True, help="Every version, not the newest of each name alone.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most this many.")
@json_option
def search(
    words: tuple[str, ...],
    type_: str | None,
    license_: str | None,
    metric: str | None,
    all_versions: bool,
    limit: int,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Find artifacts whose name, summary, kind, task, base or labels hold all words; the best match first.

    \b
    hub search legal summaries --base builtin:tiny-lm
    hub search sentiment --task classification --metric 'accuracy>=0.8'

    A word matches its beginning, too: sent finds sentiment.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import re

    from hub.store import Store

    store, text = Store(), " ".join(words)
    asked: dict[str, Any] = {**filters, "type": type_, "license": license_, "metric": metric}
    name = re.split("[<>]", metric)[0].strip() if metric else None
    if name is None:
        found = store.search(text, limit=limit, newest=not all_versions, **asked)
    else:
        found = store.list(text=text, sort=name, limit=limit, newest=not all_versions, **asked)
    if as_json:
        print_json(documents(store, found, name))
    elif found:
        click.echo(table(store, found, name))
    else:
        say(f"nothing in {store.where} fits" if store.names() else f"{store.where} is empty; `hub push DIR` fills it")
