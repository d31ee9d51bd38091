"""``hub push``."""

from __future__ import annotations

from typing import Any

import click

from hub.commands._options import jobs_option
from hub.commands._output import json_option, print_json, say, summary


@click.command()
@click.argument("target", metavar="DIR|REF")
@click.option("--to", "place", metavar="REMOTE", help="Send it there: a name (`hub remote`), a URL or a path.")
@click.option("--name", metavar="NS/NAME", help="Fact: the name.")
@click.option("--version", help="Fact: the version (PEP 440).")
@click.option("--type", "type_", help="Fact: adapter (the default), composition, router or merge.")
@click.option("--kind", help="Fact: the kind; read from a PEFT config where that tells.")
@click.option("--method", help="Fact: how it was learned.")
@click.option("--base", help="Fact: the base (builtin:..., a directory, an id), or a .json file with its identity.")
@click.option("--task", help="Fact: the task.")
@click.option("--label", "labels", multiple=True, help="Fact: a label, in order (repeat it).")
@click.option("--language", "languages", multiple=True, help="Fact: a language (repeat it).")
@click.option("--domain", "domains", multiple=True, help="Fact: a domain (repeat it).")
@click.option("--license", "license_", help="Fact: the licence (SPDX).")
@click.option("--summary", "summary_", help="Fact: one sentence.")
@click.option("--repack", is_flag=True, help="Measure the files again, keeping the facts of module.json.")
@click.option(
    "--bump",
    type=click.Choice(["auto", "major", "minor", "patch"]),
    help="The next version: computed from what changed (auto), or raised by this much. Implies --repack.",
)
@click.option(
    "--trial/--no-trial",
    default=True,
    help="Try it on its base first (the default): every tensor must have its place there.",
)
@click.option("--tag", help="Let this alias stand for it.")
@click.option("--private", is_flag=True, help="Keep it private there: a registry's, or the Hub's.")
@click.option("--requires/--no-requires", default=True, help="Send what it requires as well (the default).")
@jobs_option
@json_option
def push(
    target: str,
    place: str | None,
    type_: str | None,
    license_: str | None,
    summary_: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish a directory into the store, or send an artifact to a remote.

    \b
    hub push ./tone                                     (module.json is there)
    hub push ./peft --name acme/tone --version 1.0.0 --base builtin:tiny-lm
    hub push ./tone --bump auto --to team               (the next version, to a named remote)
    hub push acme/tone@1.0.0 --to s3://bucket/adapters  (from the store to a remote)

    Of a folder that PEFT or a Trainer wrote, optimizer states and pickles are left out and named; it stays as it is.

    A directory is checked first: no pickles, no links, no NaN, all tensors as its manifest says, each with its place on
    the base. Where the base is not on this machine that cannot be tried: give its --base, or publish with --no-trial.
    Versions are immutable: the same content again is a no-op, other content under a published version is refused.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub
    from hub.console.progress import bars

    facts = {"type": type_, "license": license_, "summary": summary_, **options}
    given = {name: value for name, value in facts.items() if value not in (None, ())}
    store = hub.Store()
    with bars() as progress:
        artifact = hub.push(target, to=place, store=store, progress=progress, say=say, **given)
    if as_json:
        print_json({**summary(artifact), "to": place})
    else:
        say(f"{artifact.ref} ({artifact.digest[:19]}...) is in {place or store.where}")
