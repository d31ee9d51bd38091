"""The table of methods, made from their registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from train.method import Method, get_method, methods

__all__ = ["describe_methods", "markdown"]


def describe_methods(name: str | None = None) -> list[dict[str, Any]]:
    """Facts of all methods, or of the one called `name`.

    Raises
    ------
    ConfigError
        There is no such method (with the nearest known one).
    """
    return [_row(cls) for cls in ([get_method(name)] if name is not None else methods().values())]


def _row(cls: type[Method]) -> dict[str, Any]:
    text = [" ".join(part.split()).replace("`", "") for part in (cls.__doc__ or "").strip().split("\n\n")]
    return {
        "method": cls.name,
        "kind": cls.kind,
        "paper": cls.paper,
        "what": text[0],
        "more": " ".join(text[1:]),
        "options": [
            {
                "name": key,
                "default": None if field.default is PydanticUndefined else field.default,
                "description": field.description or "",
            }
            for key, field in cls.Options.model_fields.items()
        ],
        "defaults": dict(cls.defaults),
        "recipe": dict(cls.recipe),
    }


def markdown(described: Iterable[Mapping[str, Any]]) -> str:
    """The table as the docs have it."""
    lines = ["| method | kind it stores | what it is | options of its own | paper |", "|---|---|---|---|---|"]
    for row in described:
        own = ", ".join(f"`{option['name']}` = {option['default']}" for option in row["options"])
        paper = row["paper"]
        link = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper else ""
        cells = (f"`{row['method']}`", f"`{row['kind']}`", row["what"], own, link)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
