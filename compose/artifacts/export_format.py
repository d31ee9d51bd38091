r"""What a format of ``hub export`` is: one class that fills a directory from an artifact.

It is a file under ``compose/export_formats/`` called like the format, or an entry point ``hub.formats``::

    @FORMATS.register("names")
    class Names(ExportFormat):
        def write(self, out: Path) -> Written:
            (out / "names.txt").write_text("\n".join(self.artifact.files))
            return [], {}

The names of all formats are known without importing one of them.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from compose.errors import KindError
from compose.formats.files import write_config
from hub.contents.checks import CONFIG, WEIGHTS
from hub.errors import UsageError
from hub.plugins import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hub.store import Artifact, Store

Written: TypeAlias = tuple[Sequence[str], Mapping[str, float]]  # what to know of it, and what was measured


@dataclass(frozen=True)
class ExportFormat(ABC):
    """A format with what is to be exported, and how; see :func:`compose.export` for the fields.

    What it had to change or lose it measures and tells. ``options`` are those of rank, quantize and base_name that it
    has a use for.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[bool] = False  # whether it can write what answers through a reader (see `compose.reader`)

    artifact: Artifact
    store: Store
    base: str | Path | None
    rank: int | None
    quantize: str | None
    base_name: str | None
    allow_base_drift: bool

    def load(self, quantize: str = "none") -> PreTrainedModel:
        """The base with the artifact active on it."""
        from compose.api import load

        return load(
            self.where,
            str(self.artifact.ref),
            quantize=quantize,
            store=self.store,
            allow_base_drift=self.allow_base_drift,
        )

    @property
    def where(self) -> str | Path:
        """The base given, else the one the artifact was made for."""
        from compose.base.at_hand import at_hand

        made_for = self.artifact.manifest.base
        if self.base is None and made_for is None:
            raise UsageError(f"{self.artifact.ref} does not say which base it is for", hint="give --base BASE")
        return self.base or at_hand(made_for)  # type: ignore[arg-type]

    def one_adapter(self, engine: str) -> Artifact:
        """The artifact; KindError if it is no single adapter, which is all that ``engine`` reads."""
        manifest = self.artifact.manifest
        if manifest.type not in ("adapter", "merge"):
            raise KindError(
                f"{self.artifact.ref} is a {manifest.type}, and {engine} reads one adapter a directory",
                hint=f"make it one adapter first: hub compose {self.artifact.ref} --merge -o NS/NAME@VERSION",
            )
        return self.artifact

    def copy_adapter(self, fields: Mapping[str, Any], out: Path) -> None:
        """Put the artifact's own files into ``out``: they are PEFT's where they hold no whole modules."""
        if self.base_name is not None:
            fields = {**fields, "base_model_name_or_path": self.base_name}
        write_config(out / CONFIG, fields)
        for name in {WEIGHTS, "README.md"} & set(self.artifact.files):
            shutil.copyfile(self.artifact.file(name), out / name)

    @abstractmethod
    def write(self, out: Path) -> Written:
        """Fill the empty directory ``out``.

        Raises
        ------
        HubError
            What the format cannot express, by name.
        """


FORMATS = Registry[type[ExportFormat]]("format", package="compose.export_formats", group="hub.formats")
