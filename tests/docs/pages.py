"""A Markdown page as the blocks and the commands that it prints; what a command of it needs in order to exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELL = ("", "bash", "console", "sh")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.M | re.S)
_NEEDS = re.compile(r"<!-- needs: ([^>]+) -->\s*\Z")
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
_ENDS = {"&&", "||", ";", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins at, and what it needs from outside, if anything."""

    language: str
    text: str
    line: int
    needs: str | None = None

    @property
    def file(self) -> str | None:
        """Name of the file that the block is, if its first line says so: ``# run.yaml``."""
        found = _FILE.match(self.text)
        return found[1] if found else None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in _FENCE.finditer(text):
        needs = _NEEDS.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 2
        inner = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
        found.append(Block(match[2], inner, line, needs[1] if needs else None))
    return found


def inline(text: str) -> list[str]:
    """Commands in running text and tables: `hub ...`, `python FILE ...`, `bench_....py ...`, `make TARGET`."""
    plain = _FENCE.sub("", text)
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", plain)]
    found = [span for span in spans if re.match(r"(hub|python|make) \S", span) and not span.endswith("...")]
    benches = [span for span in spans if re.match(r"(bench|real)_\w+\.py", span)]
    return found + [f"python tests/benchmarks/{re.sub(r'[][]', '', span)}" for span in benches]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell text as lists of words, without comments, assignments and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in lexer:
            if skip:
                skip = False
            elif word in _ENDS:
                if words:
                    yield words
                words = []
            elif word in ("<", ">", ">>"):
                skip = True
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
        if words:
            yield words


def problem(words: list[str], help_of: Callable[[Path], str] = lambda _script: "") -> str | None:
    """Why a command does not exist as it is printed; None where it does. ``help_of`` a script lists its options."""
    if words[0] == "hub":
        return _hub(words[1:])
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        return next((f"make has no {word}" for word in words[1:] if word not in targets), None)
    if words[0] == "python" and words[1] != "-c":
        return _script(words[1:], help_of)
    return None if words[0] in ("python", "accelerate", "pip") else f"nobody knows what {words[0]} is"


def _script(words: list[str], help_of: Callable[[Path], str]) -> str | None:
    if words[:2] == ["-m", "pytest"]:
        missing = [word for word in words[2:] if "/" in word and not (ROOT / word).exists()]
        return f"there is no {missing[0]}" if missing else None
    if words[0] == "-m":
        return None
    if not (ROOT / words[0]).is_file():
        return f"there is no {words[0]}"
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    unsure = [name for name in options if f'"{name}"' not in (ROOT / words[0]).read_text(encoding="utf-8")]
    odd = [name for name in unsure if not re.search(rf"{name}\b", help_of(ROOT / words[0]))]
    return f"{words[0]} has no {odd[0]}" if odd else None


def _hub(words: list[str]) -> str | None:
    import click

    from hub.cli import main

    command: click.Command = main
    context = click.Context(main, info_name="hub")
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            found = command.get_command(context, _default(command, rest[0]))
            rest.insert(0, "")
        if found is None:
            return f"{context.command_path} has no {rest[1]}"
        context = click.Context(found, info_name=rest.pop(0), parent=context)
        command = found
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"-h", "--help"}
    for word in rest:
        if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known:
            return f"{context.command_path} has no {word}"
    return None


def _default(group: object, word: str) -> str:
    """The verb that a group puts in where there is none: an expression is published, a file is learned from."""
    name = getattr(group, "name", "")
    if name == "compose" and (word.isupper() or not word.isidentifier()):
        return ""
    return "learn" if name == "few-shot" and not word.isidentifier() else word
