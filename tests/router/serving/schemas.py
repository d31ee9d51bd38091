"""Random JSON schemas: what people write (objects, enums, bounds, nested lists, references), drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "age", "city", "größe", "is open", "x", "tags", "unit-price", "note", "born")
_PATTERNS = ("^[a-z]{1,6}$", "^[0-9]{2}-[0-9]{2}$", "^(yes|no)$", "^[A-Z][a-z]+ ?[A-Z]?$")
_FORMATS = ("date", "uuid", "ipv4")


def schema(seed: int) -> dict[str, Any]:
    """An object's schema; answers to it end by themselves."""
    draw = random.Random(seed)
    made = _object(draw, 2)
    if draw.random() < 0.3:  # one of its own, referred to
        made["$defs"] = {"unit": _any(draw, 0)}
        made["properties"]["unit"] = {"$ref": "#/$defs/unit"}
    return made


def _any(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _enum, _plain]
    kinds += [_object, _array, _either] if depth else []
    return draw.choice(kinds)(draw, depth - 1)


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(_WORDS, draw.randint(1, 4))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(draw, depth) for name in names},
        "additionalProperties": False,
    }
    if draw.random() < 0.8:
        made["required"] = sorted(draw.sample(names, draw.randint(0, len(names))))
    return made


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    made: dict[str, Any] = {"type": "array", "items": _any(draw, depth), "maxItems": least + draw.randint(0, 2)}
    if least:
        made["minItems"] = least
    if draw.random() < 0.2:
        made |= {"prefixItems": [_any(draw, 0)], "maxItems": max(1, made["maxItems"])}
    return made


def _either(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(draw, depth) for _ in range(draw.randint(2, 3))]}


def _string(draw: random.Random, _depth: int) -> dict[str, Any]:
    kind = draw.random()
    if kind < 0.25:
        return {"type": "string", "pattern": draw.choice(_PATTERNS)}
    if kind < 0.4:
        return {"type": "string", "format": draw.choice(_FORMATS)}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 9)}


def _integer(draw: random.Random, _depth: int) -> dict[str, Any]:
    low = draw.randint(-1000, 1000)
    made: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + draw.choice([0, 5, 10**4])}
    if draw.random() < 0.3:
        made["exclusiveMaximum"] = made.pop("maximum") + 1
    return made


def _number(draw: random.Random, _depth: int) -> dict[str, Any]:
    low = draw.choice([-2.5, 0, 1e-3, 10])
    return {"type": "number", "minimum": low, "maximum": low + draw.choice([0.5, 3, 100])}


def _enum(draw: random.Random, _depth: int) -> dict[str, Any]:
    values = ["red", 'a "b"', "漢字", 3, -1.5, None, True, [1, "x"], {"k": 0}]
    return {"const": draw.choice(values)} if draw.random() < 0.2 else {"enum": draw.sample(values, draw.randint(1, 4))}


def _plain(draw: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}
