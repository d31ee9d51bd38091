"""Adapters in one algebra on one shared base: load, compose, activate, eject."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compose.algebra import parse as parse
    from compose.api import activate as activate
    from compose.api import attach as attach
    from compose.api import create as create
    from compose.api import detach as detach
    from compose.api import eject as eject
    from compose.api import identity as identity
    from compose.api import load as load
    from compose.api import route as route
    from compose.api import save as save
    from compose.api import tokenizer as tokenizer

_HOMES = {
    **dict.fromkeys(
        ("activate", "attach", "create", "detach", "eject", "identity", "load", "route", "save", "tokenizer"),
        "compose.api",
    ),
    "parse": "compose.algebra",
}

__all__ = ["activate", "attach", "create", "detach", "eject", "identity", "load", "parse", "route", "save", "tokenizer"]


def __getattr__(name: str) -> Any:
    # PEP 562: importing the package must not import torch; its names do, when they are first asked for.
    if name not in _HOMES:
        raise AttributeError(f"module 'compose' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
