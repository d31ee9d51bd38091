"""Kinds, functions and sites as plain facts: what tables, JSON and other tools show of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from compose.base.sites import Site
    from compose.inspection.fake_base import FakeBase


def describe_kinds(name: str | None = None) -> list[dict[str, Any]]:
    """Facts of all kinds of adapters, or of the one called ``name``; KindError where there is none."""
    from compose.kind.registry import get_kind
    from compose.kind.registry import kinds as known

    classes = [get_kind(name)] if name is not None else list(known().values())
    return [
        {
            "kind": cls.kind,
            "what": _first(sys.modules[cls.__module__].__doc__),
            "formula": _first(cls.__doc__),
            "paper": cls.paper,
            "peft_type": cls.peft_type,
            "default_targets": list(cls.default_targets),
            "options": _options(cls.Config),
        }
        for cls in classes
    ]


def _first(doc: str | None) -> str:
    """First paragraph of a docstring, on one line."""
    return " ".join((doc or "").strip().split("\n\n")[0].split()).replace("``", "`")


def describe_functions(name: str | None = None) -> list[dict[str, Any]]:
    """Facts of all functions of the algebra, or of the one called ``name``; CallError where there is none."""
    from compose.function import functions as known
    from compose.function import get_function

    specs = [get_function(name)] if name is not None else list(known().values())
    return [
        {
            "name": spec.name,
            "family": spec.family,
            "summary": spec.summary,
            "adapters": _amount(spec.minimum, spec.maximum),
            "options": _options(spec.options),
        }
        for spec in specs
    ]


def _amount(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} or more adapters"
    return f"{low} adapter{'s' * (low != 1)}" if low == high else f"{low} to {high} adapters"


def _options(model: Any) -> list[dict[str, str]]:
    """Options of a pydantic model: name, type, default and description."""
    options = []
    for name, entry in model.model_fields.items():
        default = entry.get_default(call_default_factory=True)
        options.append(
            {
                "name": entry.alias or name,
                "type": _type(entry.annotation),
                "default": "required" if entry.is_required() else "none" if default is None else _plain(default),
                "description": entry.description or "",
            }
        )
    return options


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "[]" if value == () else str(value)


def _type(annotation: Any) -> str:
    """A type as people write it: ``int``, ``list of float``, ``paper | peft``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(a) for a in args if a is not type(None)))
    if origin is tuple:
        return f"list of {_type(args[0])}"
    return getattr(annotation, "__name__", str(annotation))


def describe_sites(base: str | Path, task: str | None = None) -> dict[str, Any]:
    """Where adapters can act in a base: facts of the base, and of all its sites, those outside the blocks last.

    Only config.json of the base is read. ``by`` and ``why`` say how a site got its role: by the ``table`` of families,
    as ``part`` of a fused layer, by its ``name`` or its ``path``, or as one ``outside`` the blocks.
    """
    from compose.inspection.fake_base import FakeBase

    outline = FakeBase(base, task=task)
    facts = {"base": outline.name, "model_type": outline.sites.model_type, "sites": _sites(outline)}
    return {**facts, **_around(outline)}


def _sites(outline: FakeBase) -> list[dict[str, Any]]:
    inside = [s for whole in outline.sites for s in (whole, *outline.sites.parts.get(whole.path, ()))]
    sites = [*inside, *outline.sites.outside.values()]
    facts = []
    for site in sites:
        how, why = _recognised(site, outline.sites.model_type)
        facts.append(
            {
                "name": site.name,
                "role": site.role,
                "layer": site.layer,
                "stack": site.stack,
                "path": site.path,
                "in": site.in_features,
                "out": site.out_features,
                "by": how,
                "why": why,
            }
        )
    return facts


def _recognised(site: Site, model_type: str) -> tuple[str, str]:
    """How a site got its role: ``table``, ``part``, ``name``, ``path`` or ``outside``, and the explanation."""
    from compose.base.families import FAMILIES, guess_role

    if site.rows is not None:
        return "part", f"part of {site.module.rsplit('.', 1)[-1]}: {site.rows}"
    if site.layer is None:
        return "outside", "outside the blocks: only where a target names it"
    table = FAMILIES.get(model_type, {})
    end = next((s for s, role in table.items() if role == site.role and f".{site.path}".endswith("." + s)), None)
    if end is not None:
        return "table", f"table of {model_type}: {end}"
    last = site.path.rsplit(".", 1)[-1]
    if guess_role(site.path) == site.role:
        return "name", f"by its name: {last} is {site.role} in other families"
    return "path", f"linear in a numbered block; {last} is no name we know"


def _around(outline: FakeBase) -> dict[str, Any]:
    sites = outline.sites
    return {
        "architecture": sites.architecture,
        "known_family": sites.known_family,
        "layers": sites.depth(),
        "embedding": sites.embedding,
        "positions": list(sites.positions),
        "norms": list(sites.norms),
    }
