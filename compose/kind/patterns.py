"""Options that differ by place (PEFT's ``rank_pattern``, ``alpha_pattern``): ordered pairs of a pattern and a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeAlias

import regex
from pydantic import BeforeValidator

from compose.errors import PatternError

_PATIENCE = 1.0  # seconds for one match of a pattern from outside: some take exponential time by design


def _pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


# Pairs rather than a dict: configs are hashed, and among patterns that match the first one counts.
Patterns: TypeAlias = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_pairs)]


def value_at(patterns: Iterable[tuple[str, float]], path: str, default: float) -> float:
    """Value of the first pattern that matches the end of a module's path, at a dot or whole, as PEFT has it."""
    for pattern, value in patterns:
        try:
            if regex.fullmatch(rf"(?:.*\.)?(?:{pattern})", path, timeout=_PATIENCE) is not None:
                return value
        except (regex.error, TimeoutError) as error:
            raise PatternError(f"pattern {pattern[:80]!r} cannot be matched with {path}: {error}") from None
    return default


def as_dict(patterns: Iterable[tuple[str, float]], paths: Iterable[str]) -> dict[str, float]:
    """The form that PEFT writes, which means the same at ``paths``.

    Configs are written with sorted keys: where that would change which pattern is the first to match, each path gets
    a pattern of its own.
    """
    given, ordered, unset = tuple(patterns), sorted(patterns), float("nan")
    # NaN marks a path that no pattern matches: it keeps the default and needs no entry.
    values = {path: value_at(given, path, unset) for path in paths} if given else {}
    known = {path: value for path, value in values.items() if value == value}  # noqa: PLR0124 - not NaN
    if all(value_at(ordered, path, unset) == value for path, value in known.items()):
        return {pattern: whole(value) for pattern, value in ordered}
    return {"^" + regex.escape(path, special_only=True): whole(value) for path, value in known.items()}


def whole(value: float) -> float:
    """An integer where the number is one: PEFT and engines want it so."""
    return int(value) if value == int(value) else value
