"""Adapters inside a PeftModel in memory, as the directories that PEFT makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compose.base.given import of_peft
from compose.kind.adapter import Adapter
from hub.errors import UsageError
from hub.store import Artifact


@contextmanager
def on_disk(adapters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sources of adapters by name, where a PeftModel stands with the active adapter of it saved for the time being.

    Raises
    ------
    UsageError
        What is no source of an adapter, by its name and type.
    """
    with tempfile.TemporaryDirectory(prefix="moduloom-peft-") as room:
        yield {name: _source(name, given, Path(room) / str(i)) for i, (name, given) in enumerate(adapters.items())}


def _source(name: str, given: Any, directory: Path) -> Any:
    if isinstance(given, Adapter | Artifact | str | Path):
        return given
    active = getattr(given, "active_adapter", None)
    if not of_peft(given) or not isinstance(active, str) or not hasattr(given, "save_pretrained"):
        raise UsageError(
            f"{name!r} stands for a {type(given).__name__}, which is no adapter",
            hint="give a directory, a ref, an artifact, an adapter in memory, or a PeftModel",
        )
    given.save_pretrained(directory, selected_adapters=[active])
    return directory if active == "default" else directory / active
