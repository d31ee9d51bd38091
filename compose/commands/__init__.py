"""``hub compose``: a group whose verbs are imported when they are called; what is no verb is an expression."""

from __future__ import annotations

from typing import NamedTuple

import click

from hub.lazy import load


class Verb(NamedTuple):
    """A verb: where its command is, and its line in ``hub compose --help``."""

    target: str
    help: str


VERBS: dict[str, Verb] = {
    "check": Verb("compose.commands.check:check", "Say whether a composition works on a base; exit 0, 1 or 2."),
    "explain": Verb("compose.commands.explain:explain", "Plan, memory and cost of a composition, before it is loaded."),
    "sites": Verb("compose.commands.sites:sites", "List where adapters can act in a base, and how that is known."),
    "kinds": Verb("compose.commands.kinds:kinds", "List the kinds of adapters and their options."),
    "functions": Verb("compose.commands.functions:functions", "List the functions of the algebra and their options."),
    "map": Verb("compose.commands.map:map_", "Show how adapters interfere: cosines, duplicates, nearest."),
    "doctor": Verb("compose.commands.doctor:doctor", "Recompute someone's merge exactly and show what is wrong in it."),
}
PUBLISH = "compose.commands.publish:publish"


class ExpressionGroup(click.Group):
    """Verbs by name; any other first word begins the arguments of the command that publishes an expression."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's command now; the empty name is the one that publishes."""
        target = VERBS[cmd_name].target if cmd_name in VERBS else PUBLISH if not cmd_name else None
        command: click.Command | None = load(target) if target else None
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the empty name in front of what begins with no verb."""
        if args and args[0] not in VERBS and args[0] not in ctx.help_option_names:
            args = ["", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both forms."""
        formatter.write_usage(ctx.command_path, "VERB ...")
        formatter.write_usage(ctx.command_path, "EXPR -o NS/NAME@VERSION [--merge] [OPTIONS]", prefix=" " * 7)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, without importing what it names."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, row.help) for name, row in VERBS.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Verbs, then where the options of the other form are."""
        self.format_commands(ctx, formatter)
        with formatter.section("Publishing"):
            formatter.write_dl([("EXPR --help", "Options of the form that publishes an expression.")])


@click.group(cls=ExpressionGroup, no_args_is_help=True)
def compose() -> None:
    """Plan, check, explain and publish compositions of adapters.

    \b
    hub compose check '0.5 * acme/tone + acme/law' --base builtin:tiny-lm
    hub compose 'acme/tone >> acme/law' -o acme/both@1.0.0
    hub compose 'ties(acme/tone, acme/law)' --merge -o acme/merged@1.0.0

    a + b adds both changes, c * a scales one, a >> b applies b after a; `hub compose functions` lists the rest.
    An adapter is a ref of the store, a directory in quotes ("./tone"), or a name given by --adapter NAME=DIR|REF.
    EXPR may also be a recipe, a .json or .yaml file: {add: [{scale: 0.5, of: acme/tone}, acme/law]}.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
