"""`hub race`."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import click

from hub.console.output import columns, json_file_option, write_json

__all__ = ["race"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(_ctx: click.Context, _option: click.Parameter, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{text!r} is not a time: write such as 90s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2] or "s"]


@click.command()
@click.argument("words", nargs=-1, metavar="[RUN.yaml] [KEY=VALUE]...")
@click.option("--methods", "names", required=True, metavar="A,B,...", help="The methods that race.")
@click.option("--budget", default="10m", show_default=True, callback=_seconds, help="Time for all of them together.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("race"), show_default=True)
@json_file_option
def race(words: tuple[str, ...], names: str, budget: float, out: Path, json_path: str | None) -> None:
    """Race methods on the same data and base: each round, all train equally long and the better half goes on.

    \b
    hub race run.yaml --methods lora,bitfit,prefix,houlsby --budget 10m
    hub race data.train=train.jsonl data.eval=0.2 task=classification base=DIR options.lora.r=16 --methods lora,ia3

    Options of one method are given as options.METHOD.KEY; without METHOD they are of the run's own. The
    folder keeps race.svg (the metric against trained parameters and seconds), race.json and each method's checkpoint.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported: see `hub train`
    import train
    from train.config import read_words

    _, config = read_words(words)
    runners = train.race(config, [n for n in names.split(",") if n], budget, out, say=partial(click.echo, err=True))
    metric = config.best_metric
    write_json([runner.as_dict() for runner in runners], json_path)
    if json_path == "-":
        return
    rows = []
    for place, r in enumerate(runners, 1):
        value = f"{r.measured[metric]:.4g}" if r.measured else "-"
        counts = (f"{r.trainable:,}", str(r.rounds), str(r.steps))
        rows.append((str(place), r.method, value, *counts, f"{r.seconds:.1f}", r.ended))
    click.echo(columns(("PLACE", "METHOD", metric.upper(), "TRAINED", "ROUNDS", "STEPS", "SECONDS", "ENDED"), rows))
    click.echo(f"plot: {out / 'race.svg'}", err=True)
