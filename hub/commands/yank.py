"""``hub yank`` and ``hub delete``."""

from __future__ import annotations

import click

from hub.commands._output import json_option, print_json, say


@click.command()
@click.argument("ref")
@click.option("--reason", help="Why; shown to whoever asks for it.")
@click.option("--undo", is_flag=True, help="Take the yank back; the log keeps the --reason, if there is one.")
@click.option("--at", "place", metavar="REMOTE", help="There, instead of in the store: a name, a URL or a path.")
@json_option
def yank(ref: str, reason: str | None, undo: bool, place: str | None, as_json: bool) -> None:
    """Withdraw a version: ranges and bare names skip it, an exact pin still finds it.

    REF names one version, alias or digest.
    """
    import hub
    from hub.errors import UsageError

    if not undo and reason is None:
        raise UsageError("give --reason TEXT, or --undo")
    release = hub.unyank(ref, note=reason, at=place) if undo else hub.yank(ref, str(reason), at=place)
    exact, why = hub.AdapterRef.parse(ref).at(version=release.version), None if undo else reason
    if as_json:
        print_json({"ref": str(exact), "digest": release.digest, "yanked": why, "at": place})
    else:
        say(f"{exact} is {'back' if undo else 'yanked: ' + str(reason)}{f' in {place}' if place else ''}")


@click.command()
@click.argument("ref")
@click.option("--reason", required=True, help="Why; shown to whoever asks for it.")
@click.option("--force", is_flag=True, help="Even where another artifact of the store requires it.")
@click.option("--at", "place", metavar="REMOTE", help="There, instead of in the store: a name, a URL or a path.")
@json_option
def delete(ref: str, reason: str, force: bool, place: str | None, as_json: bool) -> None:
    """Delete one version for good: nothing is ever published under it again.

    The bytes of the store go with the next `hub gc`. A remote hides the version at once: a directory frees its bytes by
    `hub gc` with HUB_HOME there, a registry of images if it deletes at all, a bucket keeps them. Hugging Face
    repositories delete no version. To withdraw a version from new users only, yank it.
    """
    import hub

    release = hub.delete(ref, reason, force=force, at=place)
    exact = hub.AdapterRef.parse(ref).at(version=release.version)
    next_step = f" in {place}" if place else "; `hub gc` frees its space"
    if as_json:
        print_json({"ref": str(exact), "digest": release.digest, "reason": reason, "at": place})
    else:
        say(f"{exact} is deleted: {reason}{next_step}")
