"""What an answer is asked to look like, in OpenAI's words and in vLLM's: a grammar."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from router.engine.grammar import Grammar, any_of
from router.serving.errors import FieldError
from router.serving.wire.body import Body

JSON_OBJECT = {"type": "object"}


class JsonSchema(Body):
    """`response_format.json_schema`. Every answer follows it, strict or not."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=lambda: dict(JSON_OBJECT), alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """None for free text."""
        self.refuse()
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar.json_schema(JSON_OBJECT, "response_format")
        if self.json_schema is None:
            raise FieldError("response_format", "response_format has no json_schema", hint='{"schema": {...}}')
        self.json_schema.refuse()
        return Grammar.json_schema(self.json_schema.schema_, "response_format")


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool = False

    def read(self, prefix: str) -> list[Grammar]:
        """What is asked for; fields are called `prefix` and their name in errors."""
        self.refuse()
        found = []
        if self.json_ is not None:
            found.append(Grammar.json_schema(_schema(self.json_, prefix + "json"), prefix + "json"))
        if self.json_object:
            found.append(Grammar.json_schema(JSON_OBJECT, prefix + "json_object"))
        if self.regex is not None:
            found.append(Grammar("regex", self.regex, prefix + "regex"))
        if self.choice is not None:
            found.append(any_of(self.choice, prefix + "choice"))
        if self.grammar is not None:
            found.append(Grammar("lark", self.grammar, prefix + "grammar"))
        return found


def _schema(given: dict[str, Any] | str, param: str) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise FieldError(param, f"{param} is not JSON: {error}", hint="a JSON schema") from error
