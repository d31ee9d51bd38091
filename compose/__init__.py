"""Adapters in one algebra on one shared base: load, compose, activate, eject."""

from typing import TYPE_CHECKING

from hub.lazy import face

if TYPE_CHECKING:
    from compose.algebra import parse as parse
    from compose.api import activate as activate
    from compose.api import attach as attach
    from compose.api import create as create
    from compose.api import detach as detach
    from compose.api import eject as eject
    from compose.api import identity as identity
    from compose.api import load as load
    from compose.api import refresh as refresh
    from compose.api import route as route
    from compose.api import save as save
    from compose.api import tokenizer as tokenizer
    from compose.artifacts.exporting import export as export
    from compose.inspection.descriptions import describe_functions as describe_functions
    from compose.inspection.descriptions import describe_kinds as describe_kinds
    from compose.inspection.descriptions import describe_sites as describe_sites
    from compose.merging.merge import lower_to_lora as lower_to_lora
    from compose.merging.merge import merge as merge
    from compose.verbs import check as check
    from compose.verbs import diagnose as diagnose
    from compose.verbs import explain as explain
    from compose.verbs import interference as interference
    from compose.verbs import publish as publish
    from compose.verbs import publish_merge as publish_merge

    __version__: str

_HOMES = {
    "compose.api": (
        "activate",
        "attach",
        "create",
        "detach",
        "eject",
        "identity",
        "load",
        "refresh",
        "route",
        "save",
        "tokenizer",
    ),
    "compose.artifacts.exporting": ("export",),
    "compose.algebra": ("parse",),
    "compose.inspection.descriptions": ("describe_functions", "describe_kinds", "describe_sites"),
    "compose.merging.merge": ("lower_to_lora", "merge"),
    "compose.verbs": ("check", "diagnose", "explain", "interference", "publish", "publish_merge"),
}

__all__, __getattr__, __dir__ = face(__name__, _HOMES)
