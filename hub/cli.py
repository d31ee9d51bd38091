"""The ``hub`` command: a lazy table of commands, and one table of errors.

A command is reached by name when it is called, so ``hub --help`` imports none of them and ``hub list`` imports
neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import click

from hub.lazy import load


class Row(NamedTuple):
    """A command: where its function is, and its line in ``hub --help``."""

    target: str
    help: str


# One more command is one more row; `target` may lie in any package.
COMMANDS: dict[str, dict[str, Row]] = {
    "Start": {
        "quickstart": Row("train.quickstart.commands:quickstart", "See the whole idea work on text of this machine."),
        "doctor": Row("hub.commands.doctor:doctor", "Look for what is broken here, and say what to do."),
    },
    "Artifacts": {
        "push": Row("hub.commands.push:push", "Publish a directory into the store, or send an artifact to a remote."),
        "pull": Row("hub.commands.pull:pull", "Bring an artifact from a remote, checking every byte."),
        "list": Row("hub.commands.list:list_", "List the artifacts of the store."),
        "search": Row("hub.commands.search:search", "Find artifacts by words, best match first."),
        "show": Row("hub.commands.show:show", "Show one artifact: facts, metrics, files, lineage."),
        "diff": Row("hub.commands.diff:diff", "Show what differs between two adapters: config, tensors, metrics."),
        "tree": Row("hub.commands.tree:tree", "Show what an artifact requires and comes from."),
        "import": Row("hub.commands.import_:import_", "Bring a foreign adapter (PEFT) into the store, checked."),
        "export": Row("hub.commands.export:export", "Write an artifact for PEFT or vLLM, or merged into its base."),
    },
    "Versions and trust": {
        "verify": Row("hub.commands.verify:verify", "Read every byte and say what is damaged."),
        "sign": Row("hub.commands.sign:sign", "Sign an artifact with your key."),
        "tag": Row("hub.commands.tag:tag", "Let an alias stand for a version, or list aliases."),
        "untag": Row("hub.commands.tag:untag", "Remove an alias."),
        "yank": Row("hub.commands.yank:yank", "Withdraw a version from ranges, or take that back."),
        "delete": Row("hub.commands.yank:delete", "Delete a version for good; its number is never used again."),
    },
    "Projects and places": {
        "lock": Row("hub.commands.lock:lock", "Pin what a project needs, by digest, in modules.lock."),
        "sync": Row("hub.commands.lock:sync", "Bring exactly what modules.lock says."),
        "outdated": Row("hub.commands.lock:outdated", "Show what has a newer version."),
        "remote": Row("hub.commands.remote:remote", "Name the places to push to and pull from."),
        "gc": Row("hub.commands.gc:gc", "Show what nothing needs any more, and free its space."),
        "registry": Row("hub.registry.commands:registry", "Serve the store: Hugging Face protocol and web catalogue."),
    },
    "Training": {
        "train": Row("train.commands.train:train", "Train an adapter from a YAML file."),
        "few-shot": Row("train.fewshot.commands:few_shot", "Learn a classifier from a few labelled rows in seconds."),
        "methods": Row("train.commands.methods:methods", "List the methods of training."),
        "race": Row("train.commands.race:race", "Race methods at an equal budget: successive halving."),
        "eval": Row("train.commands.eval:eval_", "Measure an adapter or an expression on data."),
    },
    "Composing and routing": {
        "compose": Row("compose.commands:compose", "Plan, check and publish compositions."),
        "route": Row("router.commands:route", "Make routers, measure them and see what they choose."),
        "run": Row("router.running.commands:run", "Run JSONL rows through a base and its adapters."),
        "serve": Row("router.serving.commands:serve", "Serve a base and its adapters: the OpenAI API."),
    },
}


class ErrorRow(NamedTuple):
    """What an exception of this class means for the shell: the exit code, and a hint where it has none itself."""

    code: int
    hint: str | None = None


# By qualified class name, so that no library is imported to catch its errors; the nearest base class counts.
ERRORS: dict[str, ErrorRow] = {
    "compose.errors.ExpressionError": ErrorRow(
        2, "an expression reads like ns/a + 0.5 * ns/b >> ns/c or average(ns/a, ns/b); see docs/compose.md"
    ),
    "hub.errors.UsageError": ErrorRow(2, "`hub COMMAND --help` shows how it is called"),
    "hub.errors.ManifestError": ErrorRow(
        1, "get it again from where it came from, or pack it again: hub push --repack"
    ),
    "hub.errors.IntegrityError": ErrorRow(1, "get it again from where it came from; `hub verify` reads every byte"),
    "hub.errors.GateError": ErrorRow(1, "mend what is named, then give the command again"),
    "hub.errors.NotFound": ErrorRow(1, "`hub list` shows what there is"),
    "hub.errors.Conflict": ErrorRow(1, "look what is there now (`hub show REF`), then try again"),
    "hub.errors.BaseMismatch": ErrorRow(1, "`hub show REF` names the base it was made for"),
    "hub.errors.StoreError": ErrorRow(1, "`hub doctor` looks for what is wrong"),
    "hub.errors.RemoteError": ErrorRow(1, "`hub doctor` tries the remotes that have a name"),
    "hub.errors.HubError": ErrorRow(1),
    "builtins.FileNotFoundError": ErrorRow(1, "check the path"),
    "builtins.PermissionError": ErrorRow(1, "check the owner and the mode of the file"),
    "builtins.ModuleNotFoundError": ErrorRow(1, "install the missing package into this environment"),
    "builtins.OSError": ErrorRow(1),
    "sqlite3.DatabaseError": ErrorRow(1, "`hub verify` checks the store"),
    "torch.OutOfMemoryError": ErrorRow(1, "use --quantize nf4, a smaller batch, or another device"),
    "builtins.KeyboardInterrupt": ErrorRow(130),
}


# An expression such as '-1 * ns/a', which click would take for an option.
_NEGATIVE = re.compile(r"-\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\*")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, and whose errors end in the next step."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names of the table."""
        return [name for rows in COMMANDS.values() for name in rows]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's function now."""
        for rows in COMMANDS.values():
            if cmd_name in rows:
                command: click.Command = load(rows[cmd_name].target)
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is answered with did-you-mean."""
        name = args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-"):
            from hub.errors import UsageError, suggest

            near = suggest(name, self.list_commands(ctx))
            raise UsageError(f"there is no command {name!r}", hint=near or "`hub --help` lists all commands")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, without importing what it names."""
        for section, rows in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name, row.help) for name, row in rows.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and turn every expected error into one sentence, a hint and an exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        warnings.showwarning = _warn
        given = list(sys.argv[1:] if args is None else args)
        given = [f" {text}" if _NEGATIVE.match(text) else text for text in given]  # no option begins with a blank
        try:
            code = super().main(given, prog_name, complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            if example := _example(error):
                _hint(f"for example: {example}")
            sys.exit(error.exit_code)
        except BrokenPipeError:  # the reader of a pipe has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (click.Abort, KeyboardInterrupt):
            click.echo("aborted", err=True)
            sys.exit(ERRORS["builtins.KeyboardInterrupt"].code)
        except Exception as error:
            row = _row_of(error)
            if row is None:
                raise
            _tell(error, row)
            sys.exit(row.code)
        sys.exit(code if isinstance(code, int) else 0)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """A warning of ours is a sentence for the user; one of a library keeps its place."""
    if category.__module__.partition(".")[0] not in ("hub", "compose", "router", "train"):
        click.echo(warnings.formatwarning(message, category, filename, lineno), nl=False, err=True)
        return
    click.secho("warning: ", fg="yellow", nl=False, err=True)
    click.echo(str(message), err=True)


def _row_of(error: Exception) -> ErrorRow | None:
    """Row of an expected error; None for any other one, which is a defect and keeps its traceback."""
    for ancestor in type(error).__mro__:
        row = ERRORS.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if row is not None:
            return row
    return None


def _tell(error: Exception, row: ErrorRow) -> None:
    hint = getattr(error, "hint", None) or row.hint
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(_sentence(error), err=True)
    if hint:
        _hint(hint)


def _hint(text: str) -> None:
    click.secho("hint: ", fg="yellow", nl=False, err=True)
    click.echo(text, err=True)


def _example(error: click.ClickException) -> str | None:
    """The first example in the help of a command that was called with other words than it takes."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    lines = (context.command.help or "").splitlines() if context else []
    return next((line.strip() for line in lines if line.strip().startswith("hub ")), None)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"moduloom {version('moduloom')}")
        except PackageNotFoundError:  # run from a source tree that is not installed
            click.echo("moduloom (not installed)")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def main() -> None:
    """Adapters are packages: push, pull, compose, route and train them.

    An adapter is named ns/name@1.2.0, ns/name@alias, ns/name@sha256:..., 'ns/name>=1,<2' or ns/name; a bare name is
    in the namespace "local". The store is ~/.moduloom, or where HUB_HOME says.
    """


if __name__ == "__main__":
    main()
