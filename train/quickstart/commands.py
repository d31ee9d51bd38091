"""`hub quickstart`."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import click

from hub.console.options import quantize_option
from hub.console.output import json_file_option, write_json

__all__ = ["quickstart"]


def _known(_ctx: click.Context, _option: click.Parameter, kind: str) -> str:
    """Refuse a kind that there is not, before any text is read; torch is not imported for that."""
    from compose.kind.registry import KINDS
    from hub.errors import UsageError, suggest

    known = KINDS.names()
    if kind not in known:
        raise UsageError(f"there is no kind {kind!r}", hint=suggest(kind, known) or f"kinds are {', '.join(known)}")
    return kind


@click.command()
@click.option("--domain", "domains", multiple=True, metavar="NAME=PATH", help="Your own text; two or more of them.")
@click.option("--base", default="builtin:tiny-lm", show_default=True, help="builtin:, a model directory, or an id.")
@quantize_option("How the base is held.", default="nf4")
@click.option("--kind", default="lora", show_default=True, callback=_known, help="Kind of the experts.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Training steps an expert.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of split, training and streams.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("quickstart-out"),
    show_default=True,
    help="Folder for report.html and the second store.",
)
@json_file_option
def quickstart(
    domains: tuple[str, ...],
    base: str,
    quantize: str,
    kind: str,
    steps: int,
    seed: int,
    out: Path,
    json_path: str | None,
) -> None:
    """See the whole idea work on text of this machine.

    Trains one expert for each kind of text on a quantized base, pushes them to the store, pulls them into another,
    composes and routes them, and measures what that is worth on held-out documents.

    \b
    hub quickstart
    hub quickstart --domain law=texts/law --domain mail=mail.jsonl --json -

    What is trained already (same base, data and settings) is not trained again.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    started = time.perf_counter()
    from train.quickstart.gather import gather
    from train.quickstart.userfiles import parse_domains

    gathered = gather(parse_domains(domains) if domains else {}, seed=seed, say=partial(click.echo, err=True))

    from rich.console import Console

    # OpenMP's threads spin while they wait; where others use the cores too, that makes every step many times slower.
    # It is read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    chatter = Console(stderr=True)
    with chatter.status("loading torch and transformers"):
        from train.quickstart.findings import as_dict
        from train.quickstart.report import write_report
        from train.quickstart.story import Options, run
        from train.quickstart.tables import show
    story = run(Options(out, base, quantize, kind, seed, steps), gathered, chatter, started=started)
    report = write_report(story, out / "report.html")
    facts = as_dict(story)
    if json_path != "-":
        show(story, Console())
    write_json(facts, json_path)
    click.echo(f"report: {report}", err=True)
    click.echo(f"{facts['seconds']:.0f} s, {facts['peak_rss_mb'] or 0:.0f} MB at most", err=True)
