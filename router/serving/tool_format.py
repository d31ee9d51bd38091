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
        self,
        functions: Mapping[str, Any],
        tokens: Mapping[str, int],
        *,
        several: bool,
        otherwise: Any = None,
        free: bool = False,
    ) -> str:
        """Calls of these functions (name -> JSON schema of its arguments) as a Lark grammar.

        `tokens` are texts that are one token, which a grammar must name as that; `otherwise` is the JSON schema of
        answers that call nothing; `free` lets them be any text, which may also stand around calls.
        """
        lines = [_call(i, name, schema, self.arguments) for i, (name, schema) in enumerate(functions.items())]
        lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
        more = f"{{0,{MOST_CALLS - 1}}}"
        inner, end = _literal(self.inner, tokens), _literal(self.end, tokens)
        body = f"{inner} call {inner} {end}"
        if self.listed:
            body = '"[" call ' + (f'("," " " call){more}' if several else "") + f' "]" {end}'
        if free and not self.bare:
            head = f"TEXT {_literal(self.begin, tokens)}"
            lines += ["TEXT: /(.|\\n)*/", "tail: TEXT"]
            lines += [f"one: {head} {body}"] if self.begin in tokens else [f"head[lazy]: {head}", f"one: head {body}"]
            repeated = f"{{0,{MOST_CALLS}}}" if several else "?"
            return "\n".join([*lines, f"start: one{repeated} tail"])
        begin = "" if self.bare else _literal(self.begin, tokens)
        lines.append(f"one: {begin} {body}")
        between = json.dumps("; " if self.bare else "\n")
        lines.append("calls: one" + (f" ({between} one){more}" if several and not self.listed else ""))
        others = [] if otherwise is None else [f"answer: {lark_json(otherwise)}"]
        others += [r"answer: TEXT", r"TEXT: /([^\{ \n](.|\n)*)?/"] if free else []
        return "\n".join([*lines, "start: calls" + (" | answer" if others else ""), *others])


def _call(number: int, name: str, schema: Any, arguments: str) -> str:
    """The rule of one function's call."""
    head = '{"name": ' + json.dumps(name) + f', "{arguments}": '
    return f"call_{number}: {json.dumps(head)} {lark_json(schema)} {json.dumps('}')}"


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
