"""``hub tag`` and ``hub untag``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hub.commands._output import columns, json_option, print_json, say, summary

if TYPE_CHECKING:
    from hub.ref import AdapterRef
    from hub.store import Store


@click.command()
@click.argument("ref")
@click.argument("alias", required=False)
@click.option("--expect", metavar="VERSION|DIGEST|absent", help="Move it only if it stands there now.")
@json_option
def tag(ref: str, alias: str | None, expect: str | None, as_json: bool) -> None:
    """Let NAME@ALIAS stand for what REF is now; without ALIAS, list the aliases of a name.

    \b
    hub tag acme/tone@1.2.0 prod
    hub tag acme/tone@1.3.0 prod --expect 1.2.0    (compare and swap)
    hub tag acme/tone
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub

    if alias is None:
        if expect is not None:
            raise click.UsageError("--expect needs an ALIAS")
        _list(hub.Store(), hub.AdapterRef.parse(ref), as_json)
        return
    artifact = hub.tag(ref, alias, expect=expect)
    if as_json:
        print_json(summary(artifact))
    else:
        say(f"{artifact.ref.id}@{alias.removeprefix('@')} is {artifact.ref.version}")


def _list(store: Store, ref: AdapterRef, as_json: bool) -> None:
    store.resolve(ref.at())
    catalogue = store.catalogue(ref.id)
    versions = {alias: catalogue.find(digest=digest) for alias, digest in sorted(catalogue.aliases.items())}
    rows = [
        {"alias": alias, "version": release.version, "digest": release.digest}
        for alias, release in versions.items()
        if release is not None
    ]
    if as_json:
        print_json(rows)
    elif rows:
        click.echo(columns(("ALIAS", "VERSION", "DIGEST"), [tuple(row.values()) for row in rows]))
    else:
        say(f"{ref.id} has no alias; `hub tag {ref.id}@VERSION ALIAS` makes one")


@click.command()
@click.argument("ref", metavar="NAME@ALIAS")
@click.option("--expect", metavar="VERSION|DIGEST", help="Remove it only if it stands there now.")
@json_option
def untag(ref: str, expect: str | None, as_json: bool) -> None:
    """Remove an alias; the artifact stays."""
    import hub

    before, parsed = hub.untag(ref, expect=expect), hub.AdapterRef.parse(ref)
    if as_json:
        print_json({"name": parsed.id, "alias": parsed.alias, "was": before})
    else:
        say(f"{parsed} is gone (it was {before})")
