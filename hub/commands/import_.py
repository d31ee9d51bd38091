"""``hub import``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import json_option, print_json, say, summary

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact


@click.command("import")
@click.argument("source", metavar="DIR|hf://OWNER/NAME[@REV]")
@click.option("--name", metavar="NS/NAME", help="Fact: the name.")
@click.option("--version", help="Fact: the version (PEP 440).")
@click.option("--base", help="Fact: the base it was made for (builtin:..., a directory, an id).")
@click.option("--task", help="Fact: the task [as its config says].")
@click.option("--label", "labels", multiple=True, help="Fact: a class, in order (repeat it).")
@click.option("--language", "languages", multiple=True, help="Fact: a language (repeat it).")
@click.option("--domain", "domains", multiple=True, help="Fact: a domain (repeat it).")
@click.option("--license", "license", help="Fact: the licence (SPDX).")
@click.option("--summary", help="Fact: one sentence.")
@click.option("--subfolder", help="Which one, where the source holds several adapters.")
@click.option("--each", is_flag=True, help="All of them: each under NAME and the name of its folder, acme/tone-french.")
@click.option("--probe", is_flag=True, help="Run it on the base and record what it does, for `hub verify --run`.")
@click.option("--tag", help="Let this alias stand for it.")
@json_option
def import_(source: str, each: bool, as_json: bool, **options: Any) -> None:
    """Bring a foreign adapter, such as one that PEFT has saved, into the store.

    \b
    hub import ./peft --name acme/tone --version 1.0.0 --base builtin:tiny-lm
    hub import hf://owner/name@main --name acme/tone --version 1.0.0 --base org/model

    It is read onto the shapes of the base: a type, a field or a tensor that has no place there is refused by name. The
    source is not changed. Its tokenizer and chat template come along; weights in several safetensors files become one.
    Pickles are never read. What the files do not say is asked for, not guessed.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub
    from hub.errors import UsageError

    store = hub.Store()
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if each and (given.keys() & {"subfolder", "tag"}):
        raise UsageError("--each takes all adapters: give no --subfolder and no --tag")
    artifacts = (
        hub.import_each(source, store=store, say=say, **given)
        if each
        else [hub.import_(source, store=store, say=say, **given)]
    )
    if as_json:
        documents = [{**summary(artifact), "origin": _origin(artifact)} for artifact in artifacts]
        print_json(documents if each else documents[0])
        return
    for artifact in artifacts:
        say(f"{artifact.ref} ({artifact.digest[:19]}...) is in {store.where}")


def _origin(artifact: Artifact) -> str | None:
    lineage = artifact.manifest.lineage
    return lineage.run if lineage else None
