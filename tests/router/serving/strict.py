"""Answers held to the types of the `openai` package: no field that these do not have, none missing that they need."""

from __future__ import annotations

from pydantic import BaseModel, TypeAdapter

OURS = {"route_weights", "root", "parent"}  # what a router weighed; what a model of /v1/models was made from


def read(kind, told):
    """The answer as the package's type, checked."""
    value = TypeAdapter(kind).validate_python(told)
    check(value)
    return value


def check(value, where: str = "answer") -> None:
    """AssertionError for a field that its type does not know, or for one that is not as it was sent."""
    if isinstance(value, BaseModel):
        unknown = set(value.model_extra or {}) - OURS
        assert not unknown, f"{where} has {unknown}, which {type(value).__name__} does not know"
        needed = {name for name, field in type(value).model_fields.items() if field.is_required()}
        missing = needed - value.model_fields_set
        assert not missing, f"{where} lacks {missing} of {type(value).__name__}"
        type(value).model_validate(_told(value.model_dump(by_alias=True, exclude_unset=True)))
        for name in value.model_fields_set:
            check(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            check(one, f"{where}[{i}]")


def _told(fields):
    """Without what OpenAI's streams say and the type of a whole completion does not allow: no reason to end yet."""
    for choice in (fields, *(fields.get("choices") or ())):
        if choice.get("finish_reason", "") is None and "text" in choice:
            choice["finish_reason"] = "stop"
    return fields
