"""The YAML in front of a card (README.md), read within bounds."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>(?:.*?\n)??)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MAX_CARD = 2**20  # bytes of a card that are looked at
MAX_YAML = 64 * 1024  # characters; the YAML reader is slow, and no card needs more
MAX_DEPTH = 32  # levels of nesting


class CardError(ValueError):
    """The YAML in front of a card is not YAML, or not a mapping."""


def parse_front_matter(text: str) -> dict[str, Any]:
    """YAML in front of a card; an empty mapping where there is none. Raises CardError."""
    match = _FRONT.match(text)
    if match is None or not match["yaml"].strip():
        return {}
    if len(match["yaml"]) > MAX_YAML:
        raise CardError(f"it has more than {MAX_YAML} characters")
    try:
        _check_shape(match["yaml"])
        value = yaml.safe_load(match["yaml"])
    except CardError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise CardError(" ".join(str(error).split())[:300]) from error
    if not isinstance(value, dict):
        raise CardError("it is not a mapping of names to values")
    return value


def _check_shape(text: str) -> None:
    """Refuse what makes the reader work for ever: deep nesting is quadratic, aliases can double with every line."""
    depth = 0
    for mark in re.findall(r"[\[\]{}]", text):  # before the scanner, which looks ahead at a thousand brackets
        depth += 1 if mark in "[{" else -1
        if depth > 2 * MAX_DEPTH:
            raise CardError(f"it is nested more than {MAX_DEPTH} levels deep")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            depth -= 1
        if depth > MAX_DEPTH:
            raise CardError(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            raise CardError("it has aliases (*name), which are not read here")


def without_front_matter(text: str) -> str:
    """Markdown of a card without the YAML in front of it."""
    return _FRONT.sub("", text, count=1)


def front_matter(text: str) -> dict[str, Any]:
    """YAML in front of a card; an empty mapping where there is none that can be read."""
    try:
        return parse_front_matter(text)
    except CardError:
        return {}
