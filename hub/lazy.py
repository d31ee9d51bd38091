"""Reach things by name, so that naming them costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(target: str) -> Any:
    """Return the object of ``"package.module:name"``. Raises ImportError or AttributeError as Python does."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
