"""How a family of models writes calls of tools: the contract, what makes a grammar of it, and what reads it back.

A format is a file in `tool_formats/`, or an entry point `hub.tool_formats` of any package::

    TOOL_FORMATS.add("mine", ToolFormat(name="mine", marks=("<call>",), begin="<call>", end="</call>"))
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub.plugins import Registry
from router.engine.grammar import lark_json

MOST_CALLS = 16  # that a grammar lets one answer have


def _call_id() -> str:
    return "call_" + secrets.token_hex(12)


def short_id() -> str:
    """Nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class ToolFormat:
    """A format.

    Attributes
    ----------
    marks
        A chat template that has one of these texts writes calls so; the longest mark of all formats decides.
    begin, end
        What stands in front of a call, and behind it ("": nothing does).
    listed
        Whether calls are a JSON list between the two, instead of one object between each two.
    arguments
        What the arguments are called in an object.
    bare
        Whether an answer that begins with an object is a call, without `begin`.
    identifier
        A fresh id of a call.
    """

    name: str
    marks: tuple[str, ...]
    begin: str
    end: str = ""
    listed: bool = False
    arguments: str = "arguments"
    bare: bool = False
    inner: str = ""
    identifier: Callable[[], str] = _call_id

    def grammar(
        self, functions: Mapping[str, Any], tokens: Mapping[str, int], *, several: bool, otherwise: Any = None
    ) -> str:
        """Calls of these functions (name -> JSON schema of its arguments) as a Lark grammar.

        `tokens` are texts that are one token, which a grammar must name as that; `otherwise` is the JSON schema of
        answers that call nothing.
        """
        begin, end = ("" if self.bare else self.begin), self.end
        lines = []
        for i, (name, schema) in enumerate(functions.items()):
            head = '{"name": ' + json.dumps(name) + f', "{self.arguments}": '
            lines.append(f"call_{i}: {json.dumps(head)} {lark_json(schema)} {json.dumps('}')}")
        lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
        more = MOST_CALLS - 1
        around = [
            _literal(begin, tokens),
            _literal(self.inner, tokens),
            _literal(self.inner, tokens),
            _literal(end, tokens),
        ]
        if self.listed:
            rest = f'("," " " call){{0,{more}}}' if several else ""
            lines.append(f'calls: {around[0]} "[" call {rest} "]" {around[3]}')
        else:
            lines.append(f"one: {around[0]} {around[1]} call {around[2]} {around[3]}")
            between = "; " if self.bare else "\n"
            lines.append("calls: one" + (f" ({json.dumps(between)} one){{0,{more}}}" if several else ""))
        lines.append("start: calls" + ("" if otherwise is None else " | answer"))
        if otherwise is not None:
            lines.append(f"answer: {lark_json(otherwise)}")
        return "\n".join(lines)


def _literal(text: str, tokens: Mapping[str, int]) -> str:
    if not text:
        return ""
    return f"<[{tokens[text]}]>" if text in tokens else json.dumps(text)


TOOL_FORMATS = Registry[ToolFormat]("tool format", package="router.serving.tool_formats", group="hub.tool_formats")


def format_of(template: str) -> ToolFormat | None:
    """The format of a chat template: that with the longest mark in it."""
    found = [(len(mark), form) for form in TOOL_FORMATS.all().values() for mark in form.marks if mark in template]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def call_of(value: Any, names: Sequence[str]) -> tuple[str, str] | None:
    """Name and arguments (JSON) of a call that a model wrote as an object; None where it is none."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    given: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(given, str):
        return value["name"], given
    return (value["name"], json.dumps(given)) if isinstance(given, dict) else None
