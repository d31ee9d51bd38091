"""Tools of a conversation: functions that may be called, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import Environment, TemplateSyntaxError, meta
from pydantic import Field

from router.engine.grammar import Grammar
from router.serving.errors import FieldError
from router.serving.tool_format import TOOL_FORMATS, ToolFormat, format_of
from router.serving.tool_reader import ToolReader
from router.serving.wire.body import Answer, Body

MOST_TOOLS = 128
_ANY = {"type": "object", "properties": {}}  # what a function without a schema takes


class Function(Body):
    """A function, and the JSON schema of its arguments."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Body):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function

    def templated(self) -> dict[str, Any]:
        """As chat templates take it."""
        told = {"name": self.function.name, "description": self.function.description}
        parameters = self.function.parameters or _ANY
        return {"type": "function", "function": {**told, "parameters": parameters}}


class NamedFunction(Body):
    """The function of a choice."""

    name: str


class NamedTool(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Answer):
    """A function, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call in an answer."""

    id: str
    type: str = "function"
    function: CalledFunction


class GivenFunction(Body):
    """A function that was called before."""

    name: str
    arguments: str = "{}"


class GivenCall(Body):
    """A call in a turn of the assistant."""

    id: str = ""
    type: Literal["function"] = "function"
    function: GivenFunction

    def templated(self) -> dict[str, Any]:
        """As chat templates take it: with arguments that are an object. Raises FieldError where they are none."""
        self.refuse()
        try:
            given = json.loads(self.function.arguments or "{}")
        except ValueError as error:
            told = f"the arguments of {self.function.name} are not JSON: {error}"
            raise FieldError("messages", told, hint="as they came in the answer") from error
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": given}}


@dataclass(frozen=True)
class Toolbox:
    """What one conversation may call, in the format of its base.

    Attributes
    ----------
    only
        The functions that must be called (of `required` all, of a named one that); () where nothing must.
    several
        Whether one answer may have more than one call.
    """

    form: ToolFormat
    tools: Sequence[Tool]
    only: tuple[str, ...]
    several: bool
    tokens: Mapping[str, int]

    def reader(self) -> ToolReader:
        """Of one answer."""
        names = self.only or tuple(tool.function.name for tool in self.tools)
        return ToolReader(self.form, names, single=not self.several)

    def grammar(self, otherwise: Grammar | None) -> Grammar | None:
        """What an answer must look like: a call, a call or something of another schema, or text with strict calls."""
        free = not self.only and otherwise is None
        if free and not any(tool.function.strict for tool in self.tools):
            return None
        if otherwise is not None and (self.only or otherwise.kind != "json_schema"):
            told = f"{otherwise.param} and calls of tools that must be made are asked for"
            raise FieldError(otherwise.param, told, hint='tool_choice: "auto" or "none"')
        schemas = {
            tool.function.name: _ANY if free and not tool.function.strict else tool.function.parameters or _ANY
            for tool in self.tools
            if not self.only or tool.function.name in self.only
        }
        other = None if otherwise is None else json.loads(otherwise.text)
        text = self.form.grammar(schemas, self.tokens, several=self.several, otherwise=other, free=free)
        return Grammar("lark", text, "tools")

    @property
    def keep(self) -> tuple[int, ...]:
        """Special tokens that calls are written with."""
        return tuple(self.tokens.values())


def toolbox(
    tokenizer: Any, tools: Sequence[Tool], choice: str | NamedTool, *, several: bool, form: str | None
) -> Toolbox | None:
    """The tools of a request; None where none are to be called.

    Raises
    ------
    FieldError
        The base's chat template knows no tools, or no known format of calls; a choice that names none of them.
    """
    names = [tool.function.name for tool in tools]
    if len(tools) > MOST_TOOLS or len(set(names)) < len(names):
        raise FieldError("tools", f"{len(tools)} tools, or two of one name", hint=f"at most {MOST_TOOLS}, each its own")
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if not tools:
        if named is not None or choice == "required":
            raise FieldError("tool_choice", "tool_choice asks for a call, and there are no tools", hint="tools: [...]")
        return None
    for tool in tools:
        tool.refuse()
        tool.function.refuse()
    if named is not None and named not in names:
        raise FieldError("tool_choice", f"tool_choice names {named}", hint=f"one of {', '.join(names)}")
    template = str(tokenizer.get_chat_template(tools=[tool.templated() for tool in tools]))
    if "tools" not in _variables(template):
        raise FieldError("tools", "this base's chat template knows no tools", hint="serve --chat-template FILE")
    if choice == "none":
        return None
    found = format_of(template) if form is None else TOOL_FORMATS.all()[form]
    if found is None:
        known = ", ".join(TOOL_FORMATS.names())
        told = "it is not known how this base writes calls of tools"
        raise FieldError("tools", told, hint=f"serve --tool-format NAME ({known})")
    only = tuple(names) if choice == "required" else (named,) if named is not None else ()
    return Toolbox(found, tools, only, several, _tokens(tokenizer, (found.begin, found.end)))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, int]:
    """Those of the texts that are one token which no other text contains."""
    added = {str(token.content): number for number, token in tokenizer.added_tokens_decoder.items()}
    return {text: added[text] for text in texts if text in added}


def _variables(template: str) -> set[str]:
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))  # noqa: S701 - nothing is rendered
    except TemplateSyntaxError:  # tags of transformers' own
        return {"tools"} if "tools" in template else set()
