"""Artifacts for other engines, each in one of the formats under ``compose/export_formats/``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compose.artifacts.export_format import FORMATS
from compose.errors import KindError
from compose.planning.held import held_as, manifests_of
from compose.planning.members import AdapterFinder
from hub.contents.checks import TOKENIZER
from hub.errors import Conflict, UsageError
from hub.io.files import fsync_directory
from hub.manifest import Manifest
from hub.store import Store

__all__ = ["Exported", "export"]


def _with_readers() -> str:
    """Formats that can hold some readers."""
    return "or --format " + " or ".join(name for name, each in FORMATS.all().items() if each.reads)


@dataclass(frozen=True)
class Exported:
    """What was written, what to know of it in sentences, and what was measured."""

    ref: str
    format: str
    directory: str
    notes: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "notes": list(self.notes), "measured": dict(self.measured)}


def export(
    ref: str,
    format: str,
    out: str | Path,
    *,
    store: Store | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    quantize: str | None = None,
    base_name: str | None = None,
    allow_base_drift: bool = False,
) -> Exported:
    """Write an artifact for another engine: whole, or not at all.

    Parameters
    ----------
    ref
        An adapter, a merge, or a composition of the store.
    format
        ``peft``, ``vllm``, ``merged``, or one that another package adds.
    out
        A directory that does not exist yet, or is empty.
    base
        As for :func:`compose.load`; default: the one it was made for.
    rank
        vllm: of the LoRA that stands for what is none; exact sums of LoRAs need no rank.
    quantize
        merged: fold into the weights as this quantization rounds them, ``none`` into unrounded ones; default: as the
        adapters were trained, which is said on stderr.
    base_name
        peft, vllm: ``base_model_name_or_path``; vLLM's resolver compares it with the name the model is served under.

    Raises
    ------
    UsageError, Conflict
        An unknown format, or an option of another one; a directory that holds something.
    HubError
        What the format cannot express, by name; nothing is written then.
    """
    out = Path(out)
    chosen = FORMATS.get(format)
    for name, value in {"rank": rank, "quantize": quantize, "base_name": base_name}.items():
        if value is not None and name not in chosen.options:
            of = " or ".join(other for other, each in FORMATS.all().items() if name in each.options)
            raise UsageError(f"--{name.replace('_', '-')} belongs to --format {of}, not to {format}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} exists already", path=out, hint="give another directory with --to")
    home = store or Store()
    finder = AdapterFinder(home, paths=False)
    manifests = manifests_of([ref], finder)
    artifact = home.get(ref)
    if artifact.manifest.reader is not None and not chosen.reads:
        raise KindError(
            f"{artifact.ref} answers through its reader {artifact.manifest.reader}, which {format} has no place for: "
            "what would be written could not say a label",
            ref=artifact.ref,
            hint=f"serve it: hub serve BASE, POST /v1/classify; {_with_readers()}",
        )
    if "quantize" in chosen.options:
        quantize = held_as(quantize, manifests)
    request = chosen(artifact, home, base, rank, quantize, base_name, allow_base_drift)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as room:
        young = Path(room) / "young"
        young.mkdir()
        notes, measured = request.write(young)
        for name in set(TOKENIZER).intersection(request.artifact.files):  # its own, where it came with one
            shutil.copyfile(request.artifact.file(name), young / name)
        young.replace(out)
    fsync_directory(out.parent)
    if lost := dict(_left_out(manifests)):  # before this step, which has its own losses
        named = (f"{name} was published with {share:.2%}" for name, share in lost.items())
        notes = [*notes, *(f"{one} of the energy of its merge left out" for one in named)]
        measured = {**measured, "merge_discarded": max(lost.values())}
    return Exported(str(request.artifact.ref), format, str(out), tuple(notes), measured)


def _left_out(manifests: Iterable[Manifest]) -> Iterator[tuple[str, float]]:
    """Merges among what is exported that were published with a limited rank, and the shares left out."""
    for manifest in manifests:
        certificate = manifest.hyperparameters.get("certificate")
        lost = certificate.get("discarded") if isinstance(certificate, dict) else None
        if manifest.type == "merge" and isinstance(lost, float) and lost > 0:
            yield f"{manifest.name}@{manifest.version}", lost
