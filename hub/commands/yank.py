"""``hub yank`` and ``hub delete``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hub.commands._output import json_option, print_json, say

if TYPE_CHECKING:
    from hub.ref import AdapterRef
    from hub.remotes import Remote
    from hub.storage.releases import Release


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
    from hub.errors import UsageError
    from hub.ref import AdapterRef
    from hub.store import Store

    parsed = AdapterRef.parse(ref)
    if parsed.pin is None:
        raise UsageError(f"{ref} does not name one version", hint=f"write {parsed.id}@VERSION")
    if not undo and reason is None:
        raise UsageError("give --reason TEXT, or --undo")
    if place is not None and undo and reason is not None:
        raise UsageError("only the log of a store keeps why a yank was taken back: leave --reason out, with --at")
    why, note = (None, reason) if undo else (reason, None)
    release = Store().yank(parsed, why, note=note) if place is None else _there(place, parsed, why)
    exact = parsed.at(version=release.version)
    if as_json:
        print_json({"ref": str(exact), "digest": release.digest, "yanked": why, "at": place})
    else:
        say(f"{exact} is {'back' if undo else 'yanked: ' + str(reason)}{f' in {place}' if place else ''}")


def _there(place: str, ref: AdapterRef, reason: str | None) -> Release:
    remote, release = _found(place, ref)
    remote.yank(ref.id, release.digest, reason)
    return release


def _found(place: str, ref: AdapterRef) -> tuple[Remote, Release]:
    from hub.project.named_remotes import Remotes
    from hub.transfer import find

    remote = Remotes().open(place)
    return remote, find(remote, ref)


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
    from hub.errors import UsageError
    from hub.ref import AdapterRef
    from hub.store import Store

    parsed = AdapterRef.parse(ref)
    if parsed.pin is None:
        raise UsageError(f"{ref} does not name one version", hint=f"write {parsed.id}@VERSION")
    if place is not None and force:
        raise UsageError("--force is about what the store knows; a remote does not look who requires it")
    if place is None:
        release, next_step = Store().delete(parsed, reason, force=force), "; `hub gc` frees its space"
    else:
        remote, release = _found(place, parsed)
        remote.delete(parsed.id, release.digest, reason)
        next_step = f" in {place}"
    exact = parsed.at(version=release.version)
    if as_json:
        print_json({"ref": str(exact), "digest": release.digest, "reason": reason, "at": place})
    else:
        say(f"{exact} is deleted: {reason}{next_step}")
