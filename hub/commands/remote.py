"""``hub remote``."""

from __future__ import annotations

import click

from hub.commands._output import columns, json_option, print_json, say


@click.group()
def remote() -> None:
    """Name the places that artifacts are pushed to and pulled from.

    \b
    hub remote add team s3://bucket/adapters
    hub push acme/tone --to team
    hub pull acme/tone --from team

    Places: a directory, s3://, gs://, az://, oci://host/prefix, hf://, hf+https://host.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)


@remote.command()
@click.argument("name")
@click.argument("url", metavar="URL|PATH")
@click.option("--replace", is_flag=True, help="Let the name stand for another place from now on.")
@json_option
def add(name: str, url: str, replace: bool, as_json: bool) -> None:
    """Let NAME stand for a place. Nothing is sent there, and no credentials are kept."""
    from hub.project.named_remotes import Remotes

    address = Remotes().add(name, url, replace=replace)
    if as_json:
        print_json({"name": name, "url": address})
    else:
        say(f"{name} is {address}")


@remote.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the named places."""
    from hub.project.named_remotes import Remotes

    remotes = Remotes().all()
    if as_json:
        print_json([{"name": name, "url": url} for name, url in remotes.items()])
    elif remotes:
        click.echo(columns(("NAME", "URL"), list(remotes.items())))
    else:
        say("there is no remote; `hub remote add NAME URL` makes one")


@remote.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Forget NAME; what is there stays there."""
    from hub.project.named_remotes import Remotes

    url = Remotes().remove(name)
    if as_json:
        print_json({"name": name, "url": url})
    else:
        say(f"{name} ({url}) is forgotten")
