"""An artifact directory becomes an artifact: run the push gates, measure, write ``module.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hub.contents import checks
from hub.contents.tensor_files import FileScan, tensors_digest
from hub.errors import GateError, NotFound
from hub.gate import Check, run_gates
from hub.io.files import atomic_write, walk
from hub.manifest import MANIFEST_NAME, Draft, Manifest, read_manifest


def pack(directory: Path, draft: Draft, *, on_base: bool = False, gates: Sequence[Check] = ()) -> Manifest:
    """Check an artifact directory and write its manifest.

    The manifest is a function of the files and the draft alone: the same bytes packed again, at another time or on
    another machine, are the same artifact.

    Parameters
    ----------
    directory
        Holds the files of the artifact; ``module.json`` in it is replaced.
    draft
        What the author states.
    on_base
        Whether the gates that need the base run as well.
    gates
        Checks besides the gates: each raises GateError or returns warnings for the manifest.

    Returns
    -------
    Manifest
        The one written, with the warnings of all gates.

    Raises
    ------
    GateError, IntegrityError
        The file that must not be published; ``module.json`` is then as it was.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory", path=directory)
    manifest = measure(directory, draft)
    warnings = (*manifest.warnings, *run_gates(directory, manifest, on_base=on_base, more=gates))
    manifest = manifest.replace(warnings=tuple(dict.fromkeys(warnings)))
    atomic_write(directory / MANIFEST_NAME, manifest.canonical)
    return manifest


def measure(directory: Path, draft: Draft) -> Manifest:
    """Manifest of a directory as it is now, after the hub's own gates; nothing is written."""
    paths = [path for path in walk(directory, ignore=checks.IGNORED) if path != MANIFEST_NAME]
    checks.check_file_set(paths, draft)
    files, scans = [], dict[str, FileScan]()
    for path in paths:
        entry, scanned = checks.inspect(directory / path, path)
        files.append(entry)
        if scanned is not None:
            scans[path] = scanned
    tensors = checks.join_tensors(scans)
    if checks.WEIGHTS in scans and not tensors:
        raise GateError(f"{checks.WEIGHTS} holds no tensor", path=directory / checks.WEIGHTS)
    return Manifest(
        **{name: getattr(draft, name) for name in Draft.model_fields},
        files=tuple(files),
        tensors=tensors,
        tensors_digest=tensors_digest(tensors),
        warnings=checks.zero_warnings(scans),
    )


def check_listing(directory: Path) -> Manifest:
    """Read the manifest of a directory whose files are exactly those that it lists.

    Raises
    ------
    ManifestError, NotFound, GateError
        No manifest or a malformed one; a file that is missing; files that are not listed; links.
    """
    manifest = read_manifest(directory)
    listed = {entry.path for entry in manifest.files}
    present = {path for path in walk(directory, ignore=checks.IGNORED) if path != MANIFEST_NAME}
    if extra := sorted(present - listed):
        raise GateError(
            f"{directory} holds files that {MANIFEST_NAME} of {manifest.ref} does not list: {', '.join(extra[:5])}",
            ref=manifest.ref,
            path=directory / extra[0],
            hint=f"remove them, or pack them as a new version: hub push {directory} --repack --version NEW",
        )
    if missing := sorted(listed - present):
        raise NotFound(
            f"{directory} lacks {', '.join(missing[:5])}, which {MANIFEST_NAME} of {manifest.ref} lists",
            ref=manifest.ref,
            path=directory / missing[0],
            hint="restore the files, or pack the directory again",
        )
    return manifest


def check_directory(directory: Path) -> Manifest:
    """Check every byte of an artifact directory against its manifest.

    Raises
    ------
    ManifestError, NotFound, GateError, IntegrityError
        The first thing that is wrong.
    """
    manifest = check_listing(Path(directory))
    checks.check_file_set((entry.path for entry in manifest.files), manifest)
    scans = {}
    for entry in manifest.files:
        scanned = checks.inspect_as(manifest, entry, Path(directory) / entry.path)
        if scanned is not None:
            scans[entry.path] = scanned
    checks.check_agreement(manifest, scans)
    return manifest
