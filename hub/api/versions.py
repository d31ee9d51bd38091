"""What versions are worth: verify and sign, aliases, yanks, deletions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.api.places import find_at
from hub.errors import HubError, UsageError
from hub.lazy import load

if TYPE_CHECKING:
    from hub.ref import AdapterRef
    from hub.signing import Signed
    from hub.storage.artifact import Artifact
    from hub.storage.releases import Release
    from hub.store import Problem, Store


@dataclass(frozen=True)
class Verified:
    """What `verify` found: problems, the signature it checked, and what the probes said."""

    checked: str
    problems: tuple[Problem, ...] = ()
    signed: Signed | None = None
    run: Any = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        more = {name: value.as_dict() for name in ("signed", "run") if (value := getattr(self, name)) is not None}
        problems = [{"about": problem.about, "message": problem.message} for problem in self.problems]
        return {"checked": self.checked, **more, "ok": self.ok, "problems": problems}


def verify(
    target: str | Path | None = None,
    *,
    run: bool = False,
    key: str | Path | None = None,
    signature: str | Path | None = None,
    store: Store | None = None,
    **options: Any,
) -> Verified:
    """Read every byte of the store, of one artifact, or of a directory with ``module.json``.

    Parameters
    ----------
    target
        A ref or a directory; None is the whole store.
    run
        Run its probes too: does it do here what it did at its author's? ``base``, ``quantize`` and
        ``allow_base_drift`` in ``options`` say where.
    key
        Check its signature against this public key (PEM), read from the store or from ``signature``.

    Raises
    ------
    IntegrityError, NotFound
        The signature does not hold, or there is none. Damaged bytes are no error: they are the problems returned.
    """
    from hub.store import Store

    store = store or Store()
    if target is None and (run or key):
        raise UsageError("--run and --key are about one artifact", hint="write hub verify REF ...")
    if not run and (given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]):
        raise UsageError(f"{given[0]} needs --run")
    if signature is not None and key is None:
        raise UsageError("--signature needs --key")
    checked = store.where if target is None else str(target)
    problems = _damage(store, target)
    signed = outcome = None
    if not problems and key is not None:
        place = None if signature is None else Path(signature)
        signed = load("hub.signing:check")(store, checked, Path(key), place)
    if not problems and run:
        outcome = _run(store, checked, options)
        if not outcome.same:
            problems = [load("hub.store:Problem")(outcome.ref, str(outcome))]
    return Verified(checked, tuple(problems), signed, outcome)


def _damage(store: Store, target: str | Path | None) -> list[Problem]:
    if target is None or not Path(target).is_dir():
        return store.verify(None if target is None else str(target))
    from hub.pack import check_directory
    from hub.store import Problem

    try:
        check_directory(Path(target))
    except HubError as error:
        return [Problem(str(target), error.message)]
    return []


def _run(store: Store, ref: str, options: Mapping[str, Any]) -> Any:
    if Path(ref).is_dir():
        raise UsageError(f"{ref} is a directory; --run needs an artifact of the store", hint=f"hub push {ref} first")
    return load("compose.artifacts.probes:check")(ref, store=store, **options)


def sign(
    target: str | Path, key: str | Path, *, signature: str | Path | None = None, store: Store | None = None
) -> Signed:
    """Sign an artifact, or a directory, with a private elliptic-curve key (PEM); see `hub.signing.sign`."""
    from hub.signing import sign as make
    from hub.store import Store

    return make(store or Store(), str(target), Path(key), None if signature is None else Path(signature))


def tag(ref: str, alias: str, *, expect: str | None = None, store: Store | None = None) -> Artifact:
    """Let ``name@alias`` stand for what ``ref`` is now; with ``expect``, only if it stands there now (``absent``)."""
    from hub.store import Store

    return (store or Store()).tag(ref, alias.removeprefix("@"), expect=expect)


def untag(ref: str, *, expect: str | None = None, store: Store | None = None) -> str | None:
    """Remove the alias that ``ref`` (``ns/name@alias``) names, and say which digest it stood for."""
    from hub.ref import AdapterRef
    from hub.store import Store

    parsed = AdapterRef.parse(ref)
    if parsed.alias is None:
        raise UsageError(f"{ref} names no alias", hint=f"write hub untag {parsed.id}@ALIAS")
    return (store or Store()).untag(parsed, parsed.alias, expect=expect)


def yank(ref: str, reason: str, *, at: str | None = None, store: Store | None = None) -> Release:
    """Withdraw a version from ranges and bare names, in the store or ``at`` a remote; an exact pin still finds it."""
    return _yank(ref, reason, None, at, store)


def unyank(ref: str, *, note: str | None = None, at: str | None = None, store: Store | None = None) -> Release:
    """Take a yank back; the log of the store keeps the ``note``."""
    if at is not None and note is not None:
        raise UsageError("only the log of a store keeps why a yank was taken back: leave --reason out, with --at")
    return _yank(ref, None, note, at, store)


def _yank(ref: str, reason: str | None, note: str | None, at: str | None, store: Store | None) -> Release:
    from hub.store import Store

    exact = _exact(ref)
    if at is None:
        return (store or Store()).yank(exact, reason, note=note)
    remote, release = find_at(at, ref)
    remote.yank(exact.id, release.digest, reason)
    return release


def delete(ref: str, reason: str, *, force: bool = False, at: str | None = None, store: Store | None = None) -> Release:
    """Delete one version for good, in the store or ``at`` a remote: nothing is ever published under it again.

    ``force`` deletes it even where another artifact of the store requires it.
    """
    from hub.store import Store

    exact = _exact(ref)
    if at is None:
        return (store or Store()).delete(exact, reason, force=force)
    if force:
        raise UsageError("--force is about what the store knows; a remote does not look who requires it")
    remote, release = find_at(at, ref)
    remote.delete(exact.id, release.digest, reason)
    return release


def _exact(ref: str) -> AdapterRef:
    from hub.ref import AdapterRef

    parsed = AdapterRef.parse(ref)
    if parsed.pin is None:
        raise UsageError(f"{ref} does not name one version", hint=f"write {parsed.id}@VERSION")
    return parsed
