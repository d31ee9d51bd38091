"""``hub route``: a group whose verbs are imported when they are called."""

from __future__ import annotations

from typing import NamedTuple

import click

from hub.lazy import load


class Verb(NamedTuple):
    """A verb: where its command is, and its line in ``hub route --help``."""

    target: str
    help: str


VERBS: dict[str, Verb] = {
    "fit": Verb("router.commands.fit:fit", "Make a router of adapters and publish it."),
    "add": Verb("router.commands.fit:add", "Publish a router with one more adapter."),
    "eval": Verb(
        "router.commands.evaluate:evaluate", "Measure a router against base, best single, average and oracle."
    ),
    "explain": Verb("router.commands.explain:explain", "Show which adapters answer which tokens of a text."),
    "like": Verb("router.commands.like:like", "Rank the store's adapters for a text, without their weights."),
    "methods": Verb("router.commands.methods:methods", "List the routing methods and their options."),
}


class LazyVerbs(click.Group):
    """Verbs by name; an unknown one is answered with did-you-mean."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's command now."""
        if cmd_name not in VERBS:
            from hub.errors import UsageError, suggest

            near = suggest(cmd_name, VERBS)
            raise UsageError(f"hub route has no verb {cmd_name!r}", hint=near or "`hub route --help` lists all verbs")
        command: click.Command = load(VERBS[cmd_name].target)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, without importing what it names."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, row.help) for name, row in VERBS.items()])


@click.group(cls=LazyVerbs, no_args_is_help=True)
def route() -> None:
    """Choose the right adapter for each row or token.

    \b
    hub route fit acme/law acme/code --method arrow -o acme/router@1.0.0
    hub route fit acme/law acme/code --method discriminant --data law=l.jsonl --data code=c.jsonl -o acme/near@1.0.0
    hub route eval acme/near --data law=test.jsonl
    hub route explain acme/router --text 'def answer(): ...'

    A router is an artifact: it requires its members by range and digest, and is pushed and pulled with them.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
