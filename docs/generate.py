"""Write docs/cli.md, docs/api/ and the table in docs/methods.md: ``python docs/generate.py`` (``--check`` compares)."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from hub.cli import COMMANDS, main

HOME = Path(__file__).parent


def cli() -> str:
    """Help of every command and subcommand, in the order of ``hub --help``."""
    parts = ["# The `hub` command", "Generated from the commands' own help by `python docs/generate.py`."]
    context = click.Context(main, info_name="hub", **main.context_settings)
    for section, rows in COMMANDS.items():
        parts.append(f"## {section}")
        for name in rows:
            command = main.get_command(context, name)
            if command is None:
                raise SystemExit(f"no command {name}")
            parts += list(_help(command, name, context))
    return "\n\n".join(parts) + "\n"


def _help(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    yield f"### {context.command_path}"
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"```text\n{text}\n```"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            if (found := command.get_command(context, inner)) is not None:
                yield from _help(found, inner, context)


def methods() -> str:
    """docs/methods.md with the table of methods made anew between its two marks."""
    from train import methods_table as listing

    start, end = "<!-- methods: begin -->", "<!-- methods: end -->"
    head, rest = (HOME / "methods.md").read_text(encoding="utf-8").split(start)
    return f"{head}{start}\n{listing.markdown(listing.describe_methods())}{end}{rest.split(end)[1]}"


def api(package: str) -> str:
    """What a package shows, for mkdocstrings to fill in from the docstrings: functions first, then classes."""
    face = importlib.import_module(package)
    shown = [(name, getattr(face, name)) for name in face.__all__]
    parts = [f"# {package}", str(inspect.getdoc(face))]
    for name, thing in sorted(shown, key=lambda item: (inspect.isclass(item[1]), item[0])):
        if thing.__name__ != name:
            raise SystemExit(f"{package}.{name} is called {thing.__name__} where it is written")
        parts.append(f"::: {package}.{name}")
    return "\n\n".join(parts) + "\n"


PACKAGES = ("hub", "compose", "router", "train")
PAGES = {"cli.md": cli, "methods.md": methods, **{f"api/{name}.md": partial(api, name) for name in PACKAGES}}


def run(check: bool) -> int:
    """Write the pages, or say which are not what the code says."""
    stale = []
    for name, make in PAGES.items():
        path, text = HOME / name, make()
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    for name in stale:
        sys.stderr.write(f"docs/{name} is not what the code says: run `python docs/generate.py`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(run("--check" in sys.argv[1:]))
