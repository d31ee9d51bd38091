"""What all requests and answers share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hub.errors import UsageError, suggest
from router.engine.request import Result
from router.serving.errors import FieldError

MOST_ROWS = 256  # prompts times n of one request


# Fields that do not change an answer, whatever they hold.
_IDLE = {
    *("user", "name", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "request_id", "priority"),
}
# Fields that would change it, with the values that ask for what is done anyway; nothing and zero are among them.
_AS_IT_IS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "min_tokens": (),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "store": (),
}


class Body(BaseModel):
    """A JSON body. A field that is not known must be one that changes nothing."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """A field that is null is one that was left out."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    def refuse(self) -> None:
        """Refuse what would be ignored silently. Raises FieldError with the field's name, and the nearest known one."""
        for name, value in (self.model_extra or {}).items():
            near = (
                None if name in _AS_IT_IS else suggest(name, [f.alias or n for n, f in type(self).model_fields.items()])
            )
            idle = name in _IDLE or value is None or value in _AS_IT_IS.get(name, ())
            if not idle and (value or near):  # a misspelt `temperatur: 0` asks for something
                raise FieldError(name, f"{name} is not supported", hint=near or "leave it out")


class Answer(BaseModel):
    """What is sent. A field of `brief` is left out where it is None; all others are always there, null or not."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As JSON's types."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value is not None or not _is_brief(type(self), name)}


BRIEF = {"brief": True}  # json_schema_extra of fields that are left out where they are None


def brief() -> Any:
    """A field that is left out of an answer unless there is something to say."""
    return Field(default=None, json_schema_extra={**BRIEF})


def _is_brief(model: type[BaseModel], name: str) -> bool:
    return model.model_fields[name].json_schema_extra == BRIEF


class Usage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(results: Sequence[Result], copies: int = 1) -> Usage:
    """Counts of tokens; a prompt of several copies counts once."""
    read, written = sum(r.read for r in results[::copies]), sum(r.written for r in results)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def bounded(rows: int) -> None:
    """UsageError for more rows, or fewer, than one request may have."""
    if not 1 <= rows <= MOST_ROWS:
        raise UsageError(f"{rows} rows in one request; 1 to {MOST_ROWS} are taken")


def identifier(prefix: str, separator: str = "-") -> str:
    """A fresh id."""
    return f"{prefix}{separator}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def said(result: Result) -> str:
    """The text of a row; a router may have chosen an adapter that answers with a label or a number instead."""
    if result.text is not None:
        return result.text
    labels = (result.label,) if result.label is not None else result.labels
    return str(result.value) if labels is None else ", ".join(labels)


def weights_of(result: Result) -> dict[str, float] | None:
    """What a router gave each adapter, where there is one."""
    return dict(result.weights) or None
