"""``hub route fit`` and ``hub route add``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hub.console.output import json_option, print_json, say
from hub.console.progress import steps_bar
from router.commands._options import base_options, named_files, text_options

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact


def _shared(function: Any) -> Any:
    data = click.option(
        "--data", "data", multiple=True, metavar="NAME=FILE", help="Texts a member was made for: JSONL or plain text."
    )
    out = click.option("-o", "--out", "ref", required=True, metavar="NS/NAME@VERSION", help="Publish under this name.")
    return out(data(function))


@click.command()
@click.argument("members", nargs=-1, required=True, metavar="MEMBERS...")
@click.option("--method", required=True, help="How experts are scored; `hub route methods` lists them.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of the method (repeat).")
@_shared
@click.option("--top-k", type=int, help="Experts kept for a row or token [the method's own].")
@click.option("--threshold", type=float, help="Weights under it become 0 [0].")
@click.option("--temperature", type=float, help="Divides the scores [the method's own].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is learned.")
@text_options
@base_options
@click.option("--license", metavar="SPDX", help="Licence of the router.")
@click.option("--summary", default="", help="One sentence for its card.")
@json_option
def fit(
    members: tuple[str, ...], ref: str, data: tuple[str, ...], options: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Make a router of adapters, fitted on their texts where the method needs some, and publish it.

    \b
    hub route fit acme/law acme/code --method arrow -o acme/router@1.0.0
    hub route fit acme/law acme/code --method discriminant --data law=l.jsonl --data code=c.jsonl -o acme/near@1.0.0
    hub route fit a=acme/law 'b=acme/code>=1,<2' --method phatgoose --option steps=200 --data a=... -o acme/p@1.0.0

    A member is called by the last part of its ref, or by NAME=REF; `identity` is the bare base: none=identity.
    """  # noqa: D301
    from router.api import fit as fit_router

    with steps_bar() as progress:
        artifact = fit_router(
            members, ref=ref, data=named_files(data), options=_options(options), progress=progress, **given
        )
    _print(artifact, as_json)


@click.command()
@click.argument("router", metavar="ROUTER")
@click.argument("adapter", metavar="ADAPTER")
@_shared
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is learned.")
@text_options
@base_options
@json_option
def add(router: str, adapter: str, ref: str, data: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Publish a router with one more adapter: only the new one is measured, the others stay as they are.

    \b
    hub route add acme/router acme/mail -o acme/router@1.1.0
    hub route add acme/near mail=acme/mail --data mail=mail.jsonl -o acme/near@1.1.0
    """  # noqa: D301
    from router.api import add as add_member

    with steps_bar() as progress:
        artifact = add_member(router, adapter, ref, data=named_files(data), progress=progress, **given)
    _print(artifact, as_json)


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    from hub.errors import UsageError

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UsageError(f"{pair!r} sets no option", hint="write --option NAME=VALUE")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[name] = value
    return options


def _print(artifact: Artifact, as_json: bool) -> None:
    manifest = artifact.manifest
    if as_json:
        print_json(
            {
                "ref": str(artifact.ref),
                "digest": artifact.digest,
                "method": manifest.method,
                **manifest.hyperparameters,
                "requires": [need.as_dict() for need in manifest.requires],
                "size": manifest.size,
            }
        )
        return
    click.echo(str(artifact.ref))
    many = "adapter" if len(manifest.requires) == 1 else "adapters"
    say(f"  {artifact.digest[:19]}..., {manifest.method} over {len(manifest.requires)} {many}")
    say(f"  next: hub route eval {artifact.ref} --data NAME=FILE")
