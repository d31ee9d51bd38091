"""Where an expression acts: what ``at(a, layers=..., sites=...)`` means in one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError, SiteError
from compose.expr.tree import Call
from compose.function import bind, get_function
from compose.functions.at import AtOptions
from compose.kind.adapter import Adapter


def limits(call: Call) -> bool:
    """Whether a call says where its argument acts."""
    return get_function(call.function).family == "select"


def covers(sites: SiteMap, call: Call, path: str) -> bool:
    """Whether ``call`` lets its argument act in the module, or the part of a fused one, at ``path``."""
    options = cast("AtOptions", bind(call))
    layer = sites.layer_of(path)
    if options.layers is not None and layer is not None and layer not in options.layers:
        return False
    return options.sites is None or any(_named(sites, name, path) for name in options.sites)


def check_limits(sites: SiteMap, call: Call, adapters: Mapping[str, Adapter]) -> None:
    """Refuse what cannot be limited, and layers or sites that this model does not have.

    Raises
    ------
    SiteError
        Names the layer or the site.
    KindError
        An adapter that acts on the text or on the final states, outside all sites.
    """
    options = cast("AtOptions", bind(call))
    there = {layer for path in sites.modules if (layer := sites.layer_of(path)) is not None}
    absent = sorted(set(options.layers or ()) - there)
    if absent:
        raise SiteError(f"{call}: there is no layer {absent[0]}", hint=f"layers: {sites.depth()}")
    for name in options.sites or ():
        if not any(_named(sites, name, path) for path in (*sites.modules, *sites.paths)):
            raise sites.nothing_for(name)
    for name in call.refs:
        adapter = adapters[name]
        if adapter.prompt() is not None or FINAL in adapter.paths:
            place = "on the text itself" if adapter.prompt() is not None else "on the final states"
            raise KindError(
                f"{call}: {adapter.kind} adapter {name!r} acts {place}, which no layers and sites limit",
                hint=f"leave it outside of {call.function}(...)",
            )


def _named(sites: SiteMap, name: str, path: str) -> bool:
    if f".{name}." in f".{path}.":
        return True
    return path in sites.paths and name in (sites[path].role, sites[path].name)
