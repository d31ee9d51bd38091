"""Artifacts in, out and across: push, pull, import, export; how they differ and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.api.places import Say, find_at, moving, open_place, silent, warn, warn_of
from hub.errors import NotFound, UsageError
from hub.lazy import load

if TYPE_CHECKING:
    import networkx as nx

    from hub.console.progress import Progress
    from hub.relations.diff import Diff
    from hub.remotes.base import Remote
    from hub.storage.artifact import Artifact
    from hub.store import Store


def push(
    target: str | Path,
    *,
    to: str | None = None,
    tag: str | None = None,
    repack: bool = False,
    bump: str | None = None,
    trial: bool = True,
    private: bool = False,
    requires: bool = True,
    jobs: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    say: Say = silent,
    **facts: Any,
) -> Artifact:
    """Publish a directory into the store, send an artifact to a remote, or both.

    Parameters
    ----------
    target
        A directory, or the ref of an artifact in the store.
    to
        Where to send it.
    tag
        An alias that stands for it from now on.
    repack
        Measure the files of the directory again, keeping the facts of its ``module.json`` that are not given anew.
    bump
        ``auto``, ``major``, ``minor`` or ``patch``: the next version, instead of a given one. Implies ``repack``.
    trial
        Try a directory on its base, which must be on this machine: does every tensor have its place there?
    private
        Make the repository at ``to`` private, where that is a registry or the Hugging Face Hub.
    requires
        Whether the artifacts it requires are sent as well.
    jobs
        Files that move at once, at most.
    facts
        Of a directory without ``module.json``, or with ``repack``: name, version, type, kind, method, base, task,
        labels, languages, domains, license, summary. ``base`` is what `compose.load` takes, or a ``.json`` file with
        its identity.

    Raises
    ------
    UsageError
        A fact is missing, or has no place; a published artifact with nothing to do.
    GateError, IntegrityError, Conflict
        What must not be published, or could not be tried on its base; a version that exists with other content. Nothing
        is published then.
    """
    from hub.store import Store

    store, directory = store or Store(), Path(target).expanduser()
    remote = open_place(to)
    if private and remote is None:
        raise UsageError("--private is how a registry keeps it", hint="add --to REMOTE")
    if private and remote is not None:
        remote.keep_private()
    if directory.is_dir():
        artifact = _from_directory(store, directory, facts, repack, bump, remote, trial, say)
        ref = str(artifact.ref)
    else:
        ref = str(target)
        artifact = _from_store(store, ref, remote is not None or tag is not None, bool(facts or repack or bump))
    warn_of(artifact)
    if tag is not None:
        ref = f"{artifact.ref.id}@{tag}"
        artifact = store.tag(artifact.ref, tag)
    if remote is not None:
        load("hub.transfer:push")(store, remote, ref, requires=requires, **moving(progress, jobs))
    return artifact


def _from_directory(
    store: Store,
    directory: Path,
    facts: Mapping[str, Any],
    repack: bool,
    bump: str | None,
    remote: Remote | None,
    trial: bool,
    say: Say,
) -> Artifact:
    from hub.api.publish import publish, publish_next

    if bump is not None:
        return publish_next(store, directory, facts, bump=bump, remote=remote, trial=trial, say=say)
    return publish(store, directory, facts, repack=repack, trial=trial, say=say)


def _from_store(store: Store, ref: str, something_to_do: bool, facts: bool) -> Artifact:
    if ref.startswith((".", "/", "~")) or ref.endswith("/"):
        raise NotFound(f"{ref} is not a directory", path=ref, hint="check the path")
    if facts:
        raise UsageError("facts, --repack and --bump belong to a directory; a published artifact is immutable")
    artifact = store.get(ref)
    if not something_to_do:
        raise UsageError(f"{artifact.ref} is published already", hint=f"write hub push {ref} --to REMOTE")
    return artifact


def pull(
    ref: str,
    *,
    from_: str | None = None,
    out: str | Path | None = None,
    requires: bool = True,
    jobs: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Bring an artifact from a remote into the store, every byte checked; an alias in ``ref`` is set here too.

    Parameters
    ----------
    ref
        ``ns/name``, ``ns/name>=1,<2``, ``ns/name@1.2.0``, ``ns/name@alias`` or ``ns/name@sha256:...``.
    from_
        Where from; without it, the store itself, with ``out``.
    out
        Write the artifact as a plain directory, too.
    requires, jobs
        As for `push`.

    Raises
    ------
    NotFound
        Nothing there fits, with did-you-mean.
    IntegrityError, GateError, ManifestError
        What the remote sent is not what was published; nothing is in the store then.
    """
    from hub.store import Store

    store = store or Store()
    if from_ is None and out is None:
        raise UsageError("from where?", hint=f"write hub pull {ref} --from REMOTE, or --out DIR to copy it out")
    if from_ is None:
        artifact = store.get(ref)
    else:
        remote, release = find_at(from_, ref)
        if release.yanked is not None:
            warn(f"{ref} is yanked in {from_}: {release.yanked}")
        artifact = load("hub.transfer:pull")(store, remote, ref, requires=requires, **moving(progress, jobs))
    warn_of(artifact)
    if artifact.facts.yanked is not None:
        warn(f"{artifact.ref} is yanked: {artifact.facts.yanked}")
    if out is not None:
        artifact.materialize(Path(out))
    return artifact


def import_(
    source: str | Path,
    *,
    tag: str | None = None,
    subfolder: str | None = None,
    probe: bool = False,
    store: Store | None = None,
    say: Say = silent,
    **facts: Any,
) -> Artifact:
    """Bring a foreign adapter, such as one that PEFT has saved, into the store.

    Parameters
    ----------
    source
        A directory, or ``hf://owner/name@revision``; it is not changed.
    tag
        An alias that stands for it from now on.
    subfolder
        Which one, where the source holds several adapters.
    probe
        Run it on the base and record what it does, for `verify` with ``run``.
    facts
        name, version and base; task, labels, languages, domains, license, summary.

    Raises
    ------
    UsageError
        A fact is missing that the files do not say.
    HubError
        A type, field or tensor that has no place on the base: by name.
    """
    from hub.foreign.intake import take_in
    from hub.store import Store

    store = store or Store()
    artifact = take_in(store, str(source), facts, subfolder=subfolder, probe=probe, say=say)
    warn_of(artifact)
    return artifact if tag is None else store.tag(artifact.ref, tag)


def import_each(
    source: str | Path, *, probe: bool = False, store: Store | None = None, say: Say = silent, **facts: Any
) -> list[Artifact]:
    """Bring all adapters of a directory of several, each under ``name`` and its folder's: all of them, or none.

    Parameters and errors as for `import_`.
    """
    from hub.foreign.intake import take_in_each
    from hub.store import Store

    artifacts = take_in_each(store or Store(), str(source), facts, probe=probe, say=say)
    for artifact in artifacts:
        warn_of(artifact)
    return artifacts


def export(ref: str, format: str, out: str | Path, **options: Any) -> Any:
    """Write an artifact for another engine; see `compose.export`, whose parameters these are."""
    return load("compose.artifacts.exporting:export")(ref, format, Path(out), **options)


def diff(a: str | Path, b: str | Path, *, store: Store | None = None) -> Diff:
    """What differs between two adapters, each a ref or a directory: config, facts, tensors, metrics, files."""
    from hub.relations import diff as differ
    from hub.store import Store

    store = store or Store()
    return differ.diff(differ.side(str(a), store), differ.side(str(b), store))


def tree(ref: str, *, invert: bool = False, store: Store | None = None) -> nx.DiGraph[str]:
    """What an artifact requires and comes from, down to the roots; with ``invert``, what requires or comes from it.

    Returns
    -------
    networkx.DiGraph
        Nodes are digests with ``ref``, ``kind``, ``yanked`` and ``missing``; edges have a ``relation``: ``requires`` or
        ``parent``.
    """
    from hub.relations import lineage
    from hub.store import Store

    store = store or Store()
    return (lineage.below if invert else lineage.above)(store, store.get(ref))
