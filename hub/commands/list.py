"""``hub list``."""

from __future__ import annotations

import click

from hub.commands._output import documents, json_option, print_json, say, table


@click.command("list")
@click.argument("name", required=False)
@click.option("--base", help="Made for this base (its name, or a digest).")
@click.option("--task", help="For this task.")
@click.option("--kind", help="Of this kind: lora, ia3, ...")
@click.option("--method", help="Learned by this method.")
@click.option("--type", "type_", help="adapter, composition, router or merge.")
@click.option("--label", help="With this label.")
@click.option("--language", help="With this language.")
@click.option("--domain", help="With this domain.")
@click.option("--license", "license_", help="Under this licence.")
@click.option("--metric", metavar="NAME[>=VALUE]", help="Measured by this metric, within a bound.")
@click.option("--alias", help="With this alias.")
@click.option("--newest", is_flag=True, help="Only the highest version of each name.")
@click.option("--yanked", is_flag=True, help="Yanked versions too.")
@click.option("--sort", metavar="KEY", help="name, created, size, or a metric (best first).")
@click.option("--ascending/--descending", default=None, help="For a metric: whether the least value is the best.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many.")
@json_option
def list_(
    name: str | None,
    type_: str | None,
    license_: str | None,
    newest: bool,
    yanked: bool,
    sort: str | None,
    ascending: bool | None,
    limit: int | None,
    as_json: bool,
    **filters: str | None,
) -> None:
    """List the artifacts of the store.

    NAME is ns/name, a bare name in any namespace, or a pattern such as 'acme/*'.
    """
    from hub.query import ORDERS
    from hub.store import Store

    store = Store()
    found = store.list(
        yanked=yanked,
        newest=newest,
        sort=sort,
        ascending=ascending,
        limit=limit,
        name=name,
        type=type_,
        license=license_,
        **filters,
    )
    score = sort if sort not in (None, *ORDERS) else None
    if as_json:
        print_json(documents(store, found, score))
    elif found:
        click.echo(table(store, found, score, ascending))
    else:
        say(f"nothing in {store.where} fits" if store.names() else f"{store.where} is empty; `hub push DIR` fills it")
