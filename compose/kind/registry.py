"""Kinds by name: the files of ``compose.kinds`` and the entry points ``hub.kinds`` of other packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from compose.errors import KindError
from hub.errors import did_you_mean
from hub.plugins import Registry

if TYPE_CHECKING:  # their names are known without torch
    from compose.kind.adapter import Adapter, KindConfig

KINDS: Registry[type[Adapter]] = Registry("kind", package="compose.kinds", group="hub.kinds", error=KindError)
_A = TypeVar("_A", bound="type[Adapter]")


def register(name: str) -> Callable[[_A], _A]:
    """Class decorator that makes a kind known under ``name``."""

    def add(cls: _A) -> _A:
        KINDS.add(name, cls)
        cls.kind = name
        return cls

    return add


def kinds() -> Mapping[str, type[Adapter]]:
    """All kinds by name."""
    return KINDS.all()


def get_kind(name: str) -> type[Adapter]:
    """The kind called ``name``; KindError with a suggestion otherwise."""
    return KINDS.get(name)


def make_config(kind: type[Adapter], options: Mapping[str, Any] | KindConfig | None) -> KindConfig:
    """Validate ``options`` for ``kind``; an unknown option is refused with a suggestion."""
    if isinstance(options, BaseModel):
        if not isinstance(options, kind.Config):
            raise KindError(f"{type(options).__name__} is not the config of kind {kind.kind!r}")
        return options
    given = dict(options or {})
    fields = kind.Config.model_fields
    for key in given:
        if key not in fields:
            near = did_you_mean(key, fields, count=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise KindError(f"kind {kind.kind!r} has no option {key!r}{guess}", hint="options: " + ", ".join(fields))
    try:
        return kind.Config.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise KindError(
            f"kind {kind.kind!r}, option {where}: {first['msg']} (got {first['input']!r})",
            hint="options: " + ", ".join(fields),
        ) from None
