"""What a model's configuration says of its text: at its top, or in the part of a model that also sees or hears."""

from __future__ import annotations

from typing import Any

__all__ = ["fact", "fill_pad_id", "text_config"]


def text_config(config: Any) -> Any:
    """The configuration of the language model inside `config`; itself, where there is no other."""
    for name in ("decoder", "generator", "text_config"):  # as transformers' get_text_config; a text encoder is no such
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "model_type"):
            return inner
    return config


def fact(config: Any, name: str, default: Any = None) -> Any:
    """What a configuration says under `name`, in whichever of its parts; `default` where it says nothing."""
    for part in (text_config(config), config):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


def fill_pad_id(config: Any, pad_id: int | None) -> None:
    """Give a padding token to a configuration without one: by it a classifier finds the last token of a row."""
    for part in {id(part): part for part in (config, text_config(config))}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad_id
