"""What is broken in the store, the environment or the remotes, and what to do about each thing.

A check is a function under :func:`check` that yields findings; one that fails to look is a finding itself.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Literal

from hub.console.output import bytes_text
from hub.errors import HubError, suggest
from hub.lazy import load
from hub.plugins import Registry
from hub.project.named_remotes import Remotes
from hub.ref import name_key
from hub.store import Store

__all__ = ["CHECKS", "Finding", "examine"]

Level = Literal["ok", "note", "broken"]
_LIBRARIES = ("moduloom", "torch", "transformers", "safetensors", "huggingface-hub", "pydantic", "numpy")
_LEAST_FREE = 2**30  # bytes
_LEAST_PYTHON = (3, 10)
_GONE = ("delete", "evict")
_TORCH = "compose.inspection.torch_check:findings"
_PLUGINS = {  # group of entry points -> our folder of the same sort
    "hub.formats": "compose.export_formats",
    "hub.readers": "compose.readers",
    "hub.functions": "compose.functions",
    "hub.gates": "hub.gates",
    "hub.kinds": "compose.kinds",
    "hub.merges": "compose.merges",
    "hub.methods": "train.methods",
    "hub.remotes": "hub.remotes",
    "hub.scorers": "router.scorers",
    "hub.tool_formats": "router.serving.tool_formats",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``broken`` makes ``hub doctor`` fail, a ``note`` does not."""

    area: str
    level: Level
    message: str
    hint: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Check = Callable[[Store], Iterator[Finding]]
CHECKS: dict[str, Check] = {}


def check(area: str) -> Callable[[Check], Check]:
    """Register a check."""

    def add(function: Check) -> Check:
        CHECKS[area] = function
        return function

    return add


def examine(store: Store, *, offline: bool = False) -> Iterator[Finding]:
    """Run all checks; with ``offline`` those that need no network."""
    for area, function in CHECKS.items():
        if area == "remotes" and offline:
            continue
        try:
            yield from function(store)
        except HubError as error:
            yield Finding(area, "broken", error.message, error.hint)
        except OSError as error:
            hint = "check owner, mode and disk"
            yield Finding(area, "broken", f"{error.filename or area}: {error.strerror or error}", hint)


@check("python")
def _python(_store: Store) -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < _LEAST_PYTHON:
        yield Finding("python", "broken", system, f"use Python {'.'.join(map(str, _LEAST_PYTHON))} or newer")
    else:
        yield Finding("python", "ok", system)
    known = {name: number for name in _LIBRARIES if (number := _installed(name)) is not None}
    yield Finding("python", "ok", ", ".join(f"{name} {number}" for name, number in known.items()))
    for name in _LIBRARIES:
        if name not in known and name != "moduloom":  # it may run from a source tree
            yield Finding("python", "broken", f"{name} is not installed", "pip install moduloom")


@check("machine")
def _machine(_store: Store) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield Finding("machine", "ok", f"{os.cpu_count()} CPU cores, {bytes_text(memory)} of memory")
    try:
        yield from load(_TORCH)()
    except (ImportError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "install it again: pip install --force-reinstall torch transformers bitsandbytes"
        yield Finding("machine", "broken", f"the packages that hold models cannot be imported: {first}", hint)


@check("plugins")
def _plugins(_store: Store) -> Iterator[Finding]:
    """Entry points of other packages: each must load, and its group must be one that somebody reads."""
    installed = entry_points()
    groups = [group for group in installed.groups if group.startswith("hub.")]
    others = [point for group in groups for point in installed.select(group=group)]
    bad = {point for point in others if point.group not in _PLUGINS}
    for point in bad:
        package = point.dist.name if point.dist else "an unknown package"
        message = f"{package} adds {point.name!r} to the group {point.group!r}, which nothing reads"
        yield Finding("plugins", "broken", message, suggest(point.group, _PLUGINS) or f"groups: {', '.join(_PLUGINS)}")
    for group in sorted({point.group for point in others} & _PLUGINS.keys()):  # ours alone need no look: it costs torch
        noun = group.removeprefix("hub.").removesuffix("s")
        for broken in Registry[Any](noun, package=_PLUGINS[group], group=group).broken():
            bad.add(broken.point)
            hint = "mend or uninstall that package; what needs none of it goes on working"
            yield Finding("plugins", "broken", f"{noun} {broken.name!r} {broken.problem}", hint)
    if len(others) > len(bad):
        yield Finding("plugins", "ok", f"{len(others) - len(bad)} of other packages load")


@check("store")
def _store(store: Store) -> Iterator[Finding]:
    if not store.exists:
        yield Finding(
            "store", "note", f"{store.where} does not exist yet", "`hub push DIR` or `hub import DIR` makes it"
        )
        yield from _room(_existing(store.root))
        return
    yield from _room(store.root)
    mode = store.root.stat().st_mode & 0o777
    if mode & 0o002:
        message = f"everybody on this machine may write into {store.root} (mode {mode:o})"
        yield Finding("store", "broken", message, f"chmod o-w {store.root}")
    if not os.access(store.root, os.W_OK):
        yield Finding("store", "note", f"{store.root} may only be read", "push and pull need another HUB_HOME")
    else:
        with store.lock():
            yield Finding("store", "ok", f"{store.where} can be locked and written")
    live = dict[str, str]()
    for event, _ in store.ledger.read():  # and every link of its hash chain
        if event.op == "publish":
            live[str(event.digest)] = name_key(event.name)
        elif event.op in _GONE:
            live.pop(str(event.digest), None)
    logged = {(name, digest) for digest, name in live.items()}
    indexed = {(name_key(artifact.facts.name), artifact.digest) for artifact in store.list(yanked=True)}
    if logged == indexed:
        yield Finding("store", "ok", f"{len(logged)} artifacts; log and index agree")
    else:
        message = f"the log knows {len(logged)} artifacts, the index {len(indexed)}, {len(logged & indexed)} alike"
        hint = f"`hub verify` says what is wrong; where the log is right: rm {store.root}/index.sqlite*"
        yield Finding("store", "broken", message, hint)
    yield from _blobs(store)


def _room(place: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(place).free
    message = f"{bytes_text(free)} free where the store is"
    if free < _LEAST_FREE:
        yield Finding("store", "broken", message, "`hub gc` frees what nothing needs; HUB_HOME moves the store")
    else:
        yield Finding("store", "ok", message)
    with sqlite3.connect(":memory:") as db:
        if not db.execute("SELECT sqlite_compileoption_used('ENABLE_FTS5')").fetchone()[0]:
            yield Finding("store", "broken", "this Python's SQLite has no FTS5", "use another build of Python")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _blobs(store: Store) -> Iterator[Finding]:
    """Every file of every artifact by name and size; what is in the bytes is `hub verify`'s to say."""
    missing, size = list[str](), 0
    for artifact in store.list(yanked=True):
        for entry in artifact.manifest.files:
            if not store.blobs.has(entry.digest, entry.size):
                missing.append(f"{artifact.ref} {entry.path}")
            size += entry.size
    if missing:
        message = f"{len(missing)} files are missing or cut: {', '.join(missing[:3])}"
        yield Finding("store", "broken", message, "pull or push those artifacts again; `hub verify` reads every byte")
    else:
        yield Finding("store", "ok", f"all files are there, {bytes_text(size)} (`hub verify` reads every byte)")


@check("remotes")
def _remotes(store: Store) -> Iterator[Finding]:
    remotes = Remotes(store.root)
    known = remotes.all()
    if not known:
        yield Finding("remotes", "ok", "none has a name (`hub remote add NAME URL`)")
    for name, url in known.items():
        try:
            count = len(remotes.open(name).names())
        except HubError as error:
            hint = error.hint or f"hub remote add {name} URL --replace, or hub remote remove {name}"
            yield Finding("remotes", "broken", f"{name} ({url}): {error.message}", hint)
        else:
            yield Finding("remotes", "ok", f"{name} ({url}) answers, with {count} names")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
