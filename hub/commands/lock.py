"""``hub lock``, ``hub sync`` and ``hub outdated``."""

from __future__ import annotations

from pathlib import Path

import click

from hub.commands._options import jobs_option
from hub.commands._output import columns, json_option, print_json, say

_FILE = click.option(
    "--file", "path", type=click.Path(path_type=Path), default="modules.lock", help="The lock (modules.lock here)."
)
_FROM = click.option("--from", "source", metavar="REMOTE", help="A name (`hub remote`), a URL or a path.")


@click.command()
@click.argument("refs", nargs=-1, metavar="[REF]...")
@_FROM
@_FILE
@click.option("--upgrade", is_flag=True, help="Decide anew, also what is locked already.")
@json_option
def lock(refs: tuple[str, ...], source: str | None, path: Path, upgrade: bool, as_json: bool) -> None:
    """Pin refs, and all that they require, by digest.

    \b
    hub lock                             (what modules.yaml or modules.toml here asks for)
    hub lock 'acme/tone>=1,<2' acme/style@prod --from team

    What is locked already stays, until --upgrade. No files are fetched: `hub sync` does that.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub

    pinned = hub.lock(refs, path=path, from_=source, upgrade=upgrade)
    if as_json:
        print_json(pinned.model_dump(mode="json"))
    else:
        say(f"{path}: {len(pinned.modules)} locked for {len(pinned.requires)} asked for")


@click.command()
@_FROM
@_FILE
@jobs_option
@json_option
def sync(source: str | None, path: Path, jobs: int, as_json: bool) -> None:
    """Bring exactly what modules.lock says into the store, every byte checked."""
    import hub
    from hub.console.progress import bars

    store = hub.Store()
    with bars() as progress:
        artifacts = hub.sync(path, from_=source, jobs=jobs, store=store, progress=progress)
    if as_json:
        print_json(
            [{"ref": str(artifact.ref), "digest": artifact.digest, "fetched": new} for artifact, new in artifacts]
        )
    else:
        fetched = sum(new for _, new in artifacts)
        say(f"{len(artifacts)} locked, {fetched} fetched; {store.where} has them all")


@click.command()
@_FROM
@_FILE
@json_option
def outdated(source: str | None, path: Path, as_json: bool) -> None:
    """Show what has a newer version than modules.lock says, or than the store has (with --from).

    WANTED is the highest that the range allows; LATEST is the highest there is.
    """
    import hub

    behind = [row.as_dict() for row in hub.outdated(path, from_=source)]
    if as_json:
        print_json(behind)
    elif behind:
        fields = ("name", "current", "wanted", "latest", "yanked")
        cells = [tuple(str(row[field] or "-") for field in fields) for row in behind]
        click.echo(columns([field.upper() for field in fields], cells))
    else:
        say("all is up to date")
