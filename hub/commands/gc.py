"""``hub gc``."""

from __future__ import annotations

import click

from hub.commands._output import bytes_text, json_option, print_json, say


@click.command()
@click.option("--run", is_flag=True, help="Remove it; without this, it is only shown.")
@click.option("--superseded", is_flag=True, help="Releases too that nothing leads to.")
@click.option(
    "--grace", type=click.FloatRange(0), default=60.0, show_default=True, metavar="MINUTES", help="Spare younger bytes."
)
@json_option
def gc(run: bool, superseded: bool, grace: float, as_json: bool) -> None:
    """Show what nothing needs any more, and free its space with --run.

    That is the bytes of deleted versions and of publications that were cut off. With --superseded, also versions that
    are not the newest of their name, and that no alias, lock file, requirement or descendant leads to; they can be
    pulled again.
    """
    import hub

    removal, freed = hub.gc(run=run, superseded=superseded, grace=grace * 60)
    if as_json:
        print_json(
            {
                "releases": [str(artifact.ref) for artifact in removal.releases],
                "blobs": list(removal.blobs),
                "bytes": freed if run else removal.size,
                "removed": run,
            }
        )
        return
    for artifact in removal.releases:
        click.echo(artifact.ref)
    what = f"{len(removal.releases)} releases and {len(removal.blobs)} blobs"
    say(f"{what} are gone: {bytes_text(freed)}" if run else f"{what} would go: {bytes_text(removal.size)}; add --run")
