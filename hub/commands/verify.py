"""``hub verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import json_option, print_json, say
from hub.console.options import quantize_option

if TYPE_CHECKING:
    from hub.api.versions import Verified


@click.command()
@click.argument("target", metavar="[REF|DIR]", required=False)
@click.option("--run", is_flag=True, help="Run its probes too: does it do here what it did at its author's?")
@click.option("--base", metavar="BASE", help="With --run: on this base [the one it was made for].")
@quantize_option("With --run: how the base is held [as its author held it].")
@click.option("--allow-base-drift", is_flag=True, help="With --run: on other weights of the same architecture, too.")
@click.option("--key", type=click.Path(path_type=Path), help="Check its signature against this public key (PEM).")
@click.option("--signature", type=click.Path(path_type=Path), help="Where the signature is [where `hub sign` put it].")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    target: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Read every byte and say what is damaged; exit 1 if anything is.

    \b
    hub verify                                     (the whole store: blobs, log, index)
    hub verify acme/tone                           (one artifact)
    hub verify ./tone                              (a directory against its module.json)
    hub verify acme/tone --run --base ./my-base    (and what it does on that base)
    hub verify acme/tone --key author.pub.pem      (and who has signed it)
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub

    verdict = hub.verify(target, **options)
    if as_json:
        print_json(verdict.as_dict())
    else:
        _tell(verdict)
    if not verdict.ok:
        ctx.exit(1)


def _tell(verdict: Verified) -> None:
    if verdict.ok:
        if verdict.run is not None:
            say(f"{verdict.run.ref} {verdict.run}")
        if verdict.signed is not None:
            say(f"{verdict.checked}: signed by {verdict.signed.key}")
        say(f"{verdict.checked}: every byte is right")
        return
    for problem in verdict.problems:
        click.echo(str(problem))
    if verdict.run is not None:
        say("its bytes are right; compare the base (hub show) and how it is held (--quantize)")
    else:
        many = "s" * (len(verdict.problems) > 1)
        say(f"{len(verdict.problems)} problem{many}; pull or push the artifact again to mend it")
