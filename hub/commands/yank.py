"""``hub yank``."""

from __future__ import annotations

import click

from hub.commands._output import json_option, print_json, say


@click.command()
@click.argument("ref")
@click.option("--reason", help="Why; shown to whoever asks for it.")
@click.option("--undo", is_flag=True, help="Take the yank back.")
@json_option
def yank(ref: str, reason: str | None, undo: bool, as_json: bool) -> None:
    """Withdraw a version: ranges and bare names skip it, an exact pin still finds it.

    REF names one version, alias or digest.
    """
    from hub.errors import UsageError
    from hub.ref import AdapterRef
    from hub.store import Store

    parsed = AdapterRef.parse(ref)
    if parsed.pin is None:
        raise UsageError(f"{ref} does not name one version", hint=f"write {parsed.id}@VERSION")
    if undo == (reason is not None):
        raise UsageError("give either --reason TEXT or --undo")
    release = Store().yank(parsed, None if undo else reason)
    exact = parsed.at(version=release.version)
    if as_json:
        print_json({"ref": str(exact), "digest": release.digest, "yanked": release.yanked})
    else:
        say(f"{exact} is {'back' if undo else 'yanked: ' + str(reason)}")
