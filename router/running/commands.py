"""`hub run`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from hub.console.options import quantize_option

if TYPE_CHECKING:
    from router.engine.engine import Engine
    from router.running.job import Outcome
    from router.running.lines import Lines
    from router.running.rows import Options

_DTYPES = ("auto", "fp32", "bf16", "fp16")


@click.command()
@click.argument("source", metavar="FILE|-")
@click.option("--base", metavar="BASE", help="The base model; default: the one that --expr or --router was made for.")
@click.option("--expr", metavar="EXPR", help="Adapter or expression for all rows, such as '0.5 * legal + tone'.")
@click.option("--router", metavar="REF", help="A router that chooses the adapter for each row.")
@click.option("--adapter-column", metavar="COLUMN", help="Each row names its own adapter, expression or router here.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Default: stdout.")
@click.option("--overwrite", is_flag=True, help="Replace --out, and forget a run that was interrupted.")
@click.option("--text", metavar="COLUMN", default="text", show_default=True, help="The text or prompt.")
@click.option("--pair", metavar="COLUMN", help="A second text, for tasks on pairs.")
@click.option("--into", metavar="COLUMN", default="output", show_default=True, help="Where the answer goes.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of a continuation.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End a continuation before this text; repeatable.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; every line has its own stream.")
@click.option("--scores", metavar="N", type=click.IntRange(0, 1000), default=0, help="Add the N best labels or tokens.")
@click.option("--route-weights", is_flag=True, help="Add what the router gave each adapter.")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Bad lines.")
@quantize_option()
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True, help="auto: fp32 on a CPU.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows computed together.")
@click.option("--resident", metavar="SIZE", default="4GiB", show_default=True, help="Adapters kept in memory.")
@click.option("--allow-base-drift", is_flag=True, help="Take adapters of other weights of the same architecture.")
def run(source: str, out: Path | None, overwrite: bool, **given: Any) -> None:
    """Run JSONL rows through a base and its adapters: one process, any mixture of tasks.

    Each row comes out as it went in with the answer added: a continuation, or the label of an adapter with a head. The
    order of the rows is kept, whatever is computed together. With --out a run that was interrupted goes on where it
    was when the same command is given again, and ends in the same bytes.

    \b
    hub run mails.jsonl --expr local/triage --out answers.jsonl
    hub run mixed.jsonl --base builtin:tiny-lm --adapter-column adapter --scores 3 > answers.jsonl
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    _check_choice(given)
    _check_places(source, out)
    options = _options(given)
    base = given["base"] or _base_of(given["expr"] or given["router"])
    if given["router"] is not None:
        _check_router(given["router"])
    with _input(source) as stream:
        _run(stream, source, base, options, out, overwrite, given)


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


def _check_places(source: str, out: Path | None) -> None:
    from hub.errors import UsageError

    if out is not None and source != "-" and out.exists() and out.samefile(source):
        raise UsageError(f"{out} is the input", path=out, hint="give another --out: the input is read while it runs")


def _options(given: dict[str, Any]) -> Options:
    from dataclasses import fields

    from router.running.rows import Options

    names = {field.name for field in fields(Options)}
    return Options(adapter=given["expr"] or given["router"], **{k: v for k, v in given.items() if k in names})


def _base_of(text: str) -> str:
    """The base that the first adapter of an expression was made for."""
    from compose.algebra import parse
    from compose.base.at_hand import at_hand
    from compose.planning.unfold import unfold
    from hub.errors import UsageError
    from hub.store import Store

    store = Store()
    _, leaves = unfold(parse(text), lambda ref: store.get(ref).manifest)
    found = next((at_hand(leaf.base) for leaf in leaves.values() if leaf.base is not None), None)
    if found is None:
        raise UsageError(f"{text} does not say which base it was made for", hint="--base BASE")
    return found


def _check_router(ref: str) -> None:
    from hub.errors import UsageError
    from hub.store import Store

    artifact = Store().get(ref)
    if artifact.manifest.type != "router":
        raise UsageError(f"{ref} is no router but of type {artifact.manifest.type}", ref=ref, hint=f"--expr {ref}")


@contextmanager
def _input(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    with Path(source).open("rb") as stream:
        yield stream


def _run(
    stream: BinaryIO,
    source: str,
    base: str,
    options: Options,
    out: Path | None,
    overwrite: bool,
    given: dict[str, Any],
) -> None:
    from time import perf_counter

    from hub.console.progress import bars
    from router.running.job import Stream, check, check_adapters, go
    from router.running.journal import refuse_finished
    from router.running.lines import Lines

    lines = Lines(stream, "stdin" if source == "-" else source)
    named: dict[str, int] = {}
    if options.on_error == "stop" and source != "-":
        named = check(Lines(stream, lines.name), options)  # before the base is loaded, and hours of computing
        stream.seek(0)
    if out is not None and not overwrite:
        refuse_finished(out)  # before the base is loaded as well
    engine = _engine(base, given)
    sink: Any = Stream(sys.stdout.buffer) if out is None else _journal(out, engine, options, overwrite)
    try:
        if out is not None:
            _go_on(lines, sink, engine)
        check_adapters(engine, named, lines.name)
        started, before = perf_counter(), sink.mark.rows
        with bars() as progress:
            total = 0 if source == "-" else Path(source).stat().st_size - lines.offset
            outcome = go(engine, lines, options, sink, advance=progress("rows", total))
        if out is not None:
            sink.finish()
        _tell(outcome, before, perf_counter() - started)
    finally:
        engine.close()
        if out is not None:
            sink.close()


def _engine(base: str, given: dict[str, Any]) -> Engine:
    import torch

    from hub.console.sizes import parse_size
    from router.engine.engine import Engine

    on_cpu = not torch.cuda.is_available()
    dtype = ("fp32" if on_cpu else None) if given["dtype"] == "auto" else given["dtype"]
    return Engine(
        base,
        quantize=given["quantize"],
        dtype=dtype,
        rows=given["batch_size"],
        resident=parse_size(given["resident"]),
        allow_base_drift=given["allow_base_drift"],
    )


def _journal(out: Path, engine: Engine, options: Options, overwrite: bool) -> Any:
    from router.running.journal import Journal

    host = engine.host
    settings = {
        "base": [host.name, host.identity.weights_fingerprint, host.held],
        "batch_size": engine.rows,
        "resident": engine.residency.budget,
        **asdict(options),
    }
    return Journal(out, settings, overwrite=overwrite)


def _go_on(lines: Lines, sink: Any, engine: Engine) -> None:
    """Move the input to where an interrupted run was, and let refs mean what they meant then."""
    from hub.errors import UsageError

    mark = sink.mark
    if not sink.resumed:
        return
    if not lines.skip(mark.offset, lines=mark.rows) or (mark.offset and lines.sha256 != mark.sha256):
        raise UsageError(
            f"{lines.name} is not the input that {sink.out} was begun with",
            path=sink.path,
            hint="give the same input to go on, or --overwrite to begin anew",
        )
    engine.sources.pins.update(sink.pins)
    click.echo(f"going on after row {mark.rows:,}", err=True)


def _tell(outcome: Outcome, before: int, seconds: float) -> None:
    count = outcome.rows - before
    rows = "row" if count == 1 else "rows"
    click.echo(f"{count:,} {rows} in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f} rows/s)", err=True)
    if outcome.failed:
        click.secho(
            f"{outcome.failed:,} of {outcome.rows:,} rows failed", fg="yellow", nl=outcome.first is None, err=True
        )
        if outcome.first is not None:
            click.echo(f", the first: {outcome.first.message}", err=True)
