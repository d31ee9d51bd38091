"""``hub list``."""

from __future__ import annotations

import click

from hub.commands._options import filters
from hub.commands._output import documents, json_option, print_json, say, table


@click.command("list")
@click.argument("name", required=False)
@filters
@click.option("--newest", is_flag=True, help="Only the highest version of each name.")
@click.option("--yanked", is_flag=True, help="Yanked versions too.")
@click.option("--sort", metavar="KEY", help="name, created, size, or a metric (best first).")
@click.option("--ascending/--descending", default=None, help="For a metric: whether the least value is the best.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many.")
@json_option
def list_(
    name: str | None,
    newest: bool,
    yanked: bool,
    sort: str | None,
    ascending: bool | None,
    limit: int | None,
    as_json: bool,
    **asked: str | None,
) -> None:
    """List the artifacts of the store.

    NAME is ns/name, a bare name in any namespace, or a pattern such as 'acme/*'.
    """
    from hub.storage.query import ORDERS
    from hub.store import Store

    store = Store()
    artifacts = store.list(
        yanked=yanked, newest=newest, sort=sort, ascending=ascending, limit=limit, name=name, **asked
    )
    score = sort if sort not in (None, *ORDERS) else None
    if as_json:
        print_json(documents(store, artifacts, score))
    elif artifacts:
        click.echo(table(store, artifacts, score, ascending))
    else:
        say(f"nothing in {store.where} fits" if store.names() else f"{store.where} is empty; `hub push DIR` fills it")
