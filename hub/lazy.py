"""Reach things by name, so that naming them costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

DISTRIBUTION = "moduloom"


def load(target: str) -> Any:
    """Return the object of ``"package.module:name"``. Raises ImportError or AttributeError as Python does."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def face(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names cost nothing until used (PEP 562).

    Parameters
    ----------
    package
        Its name.
    homes
        Module -> the names that the package shows of it. ``__version__`` is shown as well.
    """
    places = {name: module for module, names in homes.items() for name in names}
    shown = sorted(places)

    def attribute(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version(DISTRIBUTION)
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *shown, "__version__"})

    return shown, attribute, names
