"""Every command that a hint, or any text of the code, tells the user to call is there, with the options it is given."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hub.cli import main

ROOT = Path(__file__).parents[2]
PACKAGES = ("hub", "compose", "router", "train")
QUOTED = re.compile(r"`hub ([^`]+)`")
IN_A_HINT = re.compile(r"(?<![\w./`])hub ([a-z-]+[^;,`()]*)")
DEFAULTS = {"compose": "", "few-shot": "learn"}  # the verb that these groups take where none is written


def text_of(node: ast.AST) -> str | None:
    """A text of the source; what is filled in stands as X."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return None


def said() -> Iterator[tuple[str, str]]:
    """Where a text stands, and the words behind ``hub`` in it."""
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if (text := text_of(node)) is not None:
                yield from ((place, words) for words in QUOTED.findall(text))
            if isinstance(node, ast.keyword) and node.arg == "hint":
                for text in filter(None, map(text_of, ast.walk(node.value))):
                    yield from ((place, words) for words in IN_A_HINT.findall(text))


def lacks(words: str) -> str | None:
    """What of a command line is not there: the command, or an option; None where all of it is."""
    found: click.Command = main
    for word in words.split():
        if isinstance(found, click.Group):
            known = found.list_commands(context := click.Context(found))
            if found is main and word not in (*known, "COMMAND", "--help"):
                return f"there is no command {word}"
            verb = word if word in known else DEFAULTS.get(str(found.name))
            found = (found.get_command(context, verb) if verb is not None else None) or found
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            options = {name for option in found.params for name in (*option.opts, *option.secondary_opts)}
            option = re.match(r"--?[\w-]+", word)
            if option and option[0] not in options | {"--help", "-h"}:
                return f"hub {found.name} has no {option[0]}"
    return None


@pytest.mark.parametrize(
    ("words", "missing"),
    [("push X --to REMOTE", None), ("compose check X", None), ("psh X", "command"), ("pull X --form Y", "--form")],
)
def test_what_the_test_sees(words: str, missing: str | None) -> None:
    found = lacks(words)
    assert found is None if missing is None else missing in str(found)


def test_every_command_that_is_told_is_there() -> None:
    lines = dict.fromkeys(said())
    assert len(lines) > 100
    assert [f"{place}: hub {words}: {missing}" for place, words in lines if (missing := lacks(words))] == []
