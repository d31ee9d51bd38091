"""`hub run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.console.options import quantize_option

if TYPE_CHECKING:
    from router.running.job import Outcome

_DTYPES = ("auto", "fp32", "bf16", "fp16")


@click.command()
@click.argument("source", metavar="FILE|-")
@click.option("--base", metavar="BASE", help="The base model; default: the one that --expr or --router was made for.")
@click.option("--expr", metavar="EXPR", help="Adapter or expression for all rows, such as '0.5 * legal + tone'.")
@click.option("--router", metavar="REF", help="A router that chooses the adapter for each row.")
@click.option("--adapter-column", metavar="COLUMN", help="Each row names its own adapter, expression or router here.")
@click.option("--task-column", metavar="COLUMN", help="Each row names here which member of a `task` router answers.")
@click.option(
    "--adapter", "adapters", metavar="NAME=DIR|REF", multiple=True, help="What a name in expressions stands for."
)
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Default: stdout, as JSON lines."
)
@click.option("--overwrite", is_flag=True, help="Replace --out, and forget a run that was interrupted.")
@click.option("--text", metavar="COLUMN", default="text", show_default=True, help="The text or prompt.")
@click.option("--pair", metavar="COLUMN", help="A second text, for tasks on pairs.")
@click.option("--chat", is_flag=True, help="The text is what a user says, for the base's chat template.")
@click.option("--into", metavar="COLUMN", default="output", show_default=True, help="Where the answer goes.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of a continuation.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End a continuation before this text; repeatable.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; every line has its own stream.")
@click.option("--scores", metavar="N", type=click.IntRange(0, 1000), default=0, help="Add the N best labels or tokens.")
@click.option("--route-weights", is_flag=True, help="Add what the router gave each adapter.")
@click.option("--on-error", type=click.Choice(["skip", "stop"]), default="skip", show_default=True, help="Bad rows.")
@quantize_option()
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True, help="auto: fp32 on a CPU.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda:1 [a GPU where there is one].")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows computed together.")
@click.option("--resident", metavar="SIZE", default="4GiB", show_default=True, help="Adapters kept in memory.")
@click.option("--allow-base-drift", is_flag=True, help="Take adapters of other weights of the same architecture.")
@click.pass_context
def run(ctx: click.Context, /, source: str, out: Path | None, **given: Any) -> None:
    """Run the rows of a file through a base and its adapters: one process, any mixture of tasks.

    FILE and --out are JSON lines, CSV, TSV or Parquet by their suffix; FILE and JSON lines also .gz. Each row comes out
    as it went in with the answer added: a continuation, or the label of an adapter with a head. The order of the rows
    is kept, whatever is computed together. With --out a run that was interrupted goes on where it was when the same
    command is given again, and ends in the same bytes. A row that cannot be computed says so in its place, and the
    command ends in 1.

    \b
    hub run mails.jsonl --expr local/triage --out answers.jsonl
    hub run mixed.csv --base builtin:tiny-lm --adapter-column adapter --scores 3 --out answers.parquet
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from compose.planning.members import assignments
    from hub.console.progress import bars
    from router.running.run import run as run_rows

    _check_choice(given)
    expr, router = given.pop("expr"), given.pop("router")
    if router is not None:
        _check_router(router)
    outcome = run_rows(
        sys.stdin.buffer if source == "-" else source,
        sys.stdout.buffer if out is None else out,
        adapter=expr or router,
        adapters=assignments(given.pop("adapters")),
        progress=bars,
        on_resume=lambda rows: click.echo(f"going on after row {rows:,}", err=True),
        **given,
    )
    _report(outcome)
    if outcome.failed:
        ctx.exit(1)


def _check_choice(given: dict[str, Any]) -> None:
    from hub.errors import UsageError

    named = [f"--{n.replace('_', '-')}" for n in ("expr", "router", "adapter_column") if given[n] is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} both say what is applied", hint="give one of them")
    if not named and given["base"] is None:
        raise UsageError(
            "nothing says what to run", hint="--expr EXPR, --router REF or --adapter-column COLUMN, or --base"
        )
    if given["adapter_column"] and given["base"] is None:
        raise UsageError("rows that name their adapters need a base", hint="--base BASE")


def _check_router(ref: str) -> None:
    from hub.errors import UsageError
    from hub.store import Store

    artifact = Store().get(ref)
    if artifact.manifest.type != "router":
        raise UsageError(f"{ref} is no router but of type {artifact.manifest.type}", ref=ref, hint=f"--expr {ref}")


def _report(outcome: Outcome) -> None:
    count, seconds = outcome.computed, outcome.seconds
    rows = "row" if count == 1 else "rows"
    click.echo(f"{count:,} {rows} in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f} rows/s)", err=True)
    if outcome.failed:
        click.secho(
            f"{outcome.failed:,} of {outcome.rows:,} rows failed", fg="yellow", nl=outcome.first is None, err=True
        )
        if outcome.first is not None:
            click.echo(f", the first: {outcome.first.message}", err=True)
