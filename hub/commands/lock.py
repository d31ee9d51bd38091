"""``hub lock``, ``hub sync`` and ``hub outdated``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.commands._options import jobs_option
from hub.commands._output import columns, json_option, print_json, say

if TYPE_CHECKING:
    from hub.project.lock import Lock, Pin
    from hub.remotes import Remote
    from hub.storage.releases import Catalogue
    from hub.store import Store

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
    from hub.errors import UsageError
    from hub.project.lock import Lock, Resolver, Roots, read_wishes
    from hub.ref import AdapterRef
    from hub.store import Store

    store = Store()
    held = Lock.load(path) if path.exists() else None
    known = held.requires if held else {}
    wishes = read_wishes(path.parent)
    wanted = [str(AdapterRef.parse(ref)) for ref in refs] or (wishes[0] if wishes else []) or list(known)
    if not wanted:
        raise UsageError("what shall be locked?", hint="write refs, or a modules.yaml with `requires: [acme/tone>=1]`")
    remote = _remote(source or (wishes[1] if wishes else None))
    found = Resolver(store, remote, None if upgrade else held).lock(wanted)
    found.save(path)
    Roots(store).add(store, path)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        say(f"{path}: {len(found.modules)} locked for {len(found.requires)} asked for")


@click.command()
@_FROM
@_FILE
@jobs_option
@json_option
def sync(source: str | None, path: Path, jobs: int, as_json: bool) -> None:
    """Bring exactly what modules.lock says into the store, every byte checked."""
    from hub.console.progress import bars
    from hub.errors import UsageError
    from hub.project import lock as locks
    from hub.store import Store

    store, held = Store(), locks.Lock.load(path)
    wishes = locks.read_wishes(path.parent)
    if wishes is not None and set(wishes[0]) != set(held.requires):
        raise UsageError(f"{path} is not the lock of what is asked for beside it", hint="run `hub lock` first")
    with bars() as progress:
        found = list(locks.sync(held, store, _remote(source), progress, jobs=jobs))
    locks.Roots(store).add(store, path)
    if as_json:
        print_json([{"ref": str(artifact.ref), "digest": artifact.digest, "fetched": new} for artifact, new in found])
    else:
        fetched = sum(new for _, new in found)
        say(f"{len(found)} locked, {fetched} fetched; {store.where} has them all")


@click.command()
@_FROM
@_FILE
@json_option
def outdated(source: str | None, path: Path, as_json: bool) -> None:
    """Show what has a newer version than modules.lock says, or than the store has (with --from).

    WANTED is the highest that the range allows; LATEST is the highest there is.
    """
    from hub.errors import UsageError
    from hub.project.lock import Lock
    from hub.store import Store

    store, remote = Store(), _remote(source)
    if path.exists():
        held = Lock.load(path)
        rows = [_row(pin, held, _catalogue(store, remote, pin)) for pin in held.modules]
    elif remote is not None:
        rows = [_newer(store, remote, name) for name in store.names()]
    else:
        raise UsageError(f"there is no {path}, and no remote to compare the store with", hint="add --from REMOTE")
    found = [row for row in rows if row["yanked"] or _is_newer(row["latest"], row["current"])]
    if as_json:
        print_json(found)
    elif found:
        fields = ("name", "current", "wanted", "latest", "yanked")
        cells = [tuple(str(row[field] or "-") for field in fields) for row in found]
        click.echo(columns([field.upper() for field in fields], cells))
    else:
        say("all is up to date")


def _remote(text: str | None) -> Remote | None:
    if text is None:
        return None
    from hub.project.named_remotes import Remotes

    return Remotes().open(text)


def _catalogue(store: Store, remote: Remote | None, pin: Pin) -> Catalogue:
    from hub.remotes import from_url

    if remote is not None or pin.source is not None:
        return (remote or from_url(str(pin.source))).catalogue(pin.name)
    return store.catalogue(pin.name)


def _row(pin: Pin, held: Lock, catalogue: Catalogue) -> dict[str, Any]:
    asked = [ref for ref, digest in held.decided().items() if digest == pin.digest]
    release = catalogue.find(digest=pin.digest)
    return {
        "name": pin.name,
        "current": pin.version,
        "wanted": _version(asked[0] if asked else pin.name, catalogue),
        "latest": _version(pin.name, catalogue),
        "yanked": release.yanked if release else None,
    }


def _newer(store: Store, remote: Remote, name: str) -> dict[str, Any]:
    here, there = store.catalogue(name), remote.catalogue(name)
    current = _version(name, here)
    release = there.find(version=current) if current else None
    latest = _version(name, there)
    yanked = release.yanked if release else None
    return {"name": name, "current": current, "wanted": latest, "latest": latest, "yanked": yanked}


def _is_newer(latest: str | None, current: str | None) -> bool:
    from hub.ref import version_key

    return latest is not None and (current is None or version_key(latest) > version_key(current))


def _version(ref: str, catalogue: Catalogue) -> str | None:
    """Version that a ref stands for in a catalogue; None where nothing fits."""
    from hub.errors import NotFound
    from hub.ref import AdapterRef
    from hub.storage.releases import choose

    try:
        return choose(AdapterRef.parse(ref), catalogue).version
    except NotFound:
        return None
