"""`hub train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.console.output import json_file_option, write_json

if TYPE_CHECKING:
    from train.config import TrainConfig

__all__ = ["train"]


def _print_fields(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from train.config import TrainConfig

    for name, entry in TrainConfig.model_fields.items():
        default = json.dumps(entry.get_default(call_default_factory=True))
        click.echo(f"{name} = {default}\n    {entry.description}")
    ctx.exit()


@click.command()
@click.argument("words", nargs=-1, metavar="[RUN.yaml] [KEY=VALUE]...")
@click.option("--name", metavar="NS/NAME[@VERSION]", help="Publish under this name [local/<file>, next version].")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The run's folder [runs/<name>].")
@click.option("--publish/--no-publish", default=True, help="Put the adapter into the store (the default).")
@click.option("--license", "license_", metavar="SPDX", help="Licence of the adapter, such as apache-2.0.")
@click.option(
    "--save-every",
    type=click.IntRange(0),
    default=100,
    metavar="STEPS",
    help="Steps between checkpoints [100]; 0: none.",
)
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint, exactly.")
@click.option("--dry-run", is_flag=True, help="Show sites, counts, memory, time and the first example; train nothing.")
@click.option("--track", "trackers", multiple=True, metavar="NAME", help="Also log to tensorboard, wandb, mlflow, ...")
@json_file_option
@click.option(
    "--fields", is_flag=True, expose_value=False, is_eager=True, callback=_print_fields, help="List all keys."
)
def train(
    words: tuple[str, ...],
    name: str | None,
    out: Path | None,
    publish: bool,
    license_: str | None,
    save_every: int,
    resume: bool,
    dry_run: bool,
    trackers: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Train an adapter from a YAML file, evaluate it, keep the best and publish it.

    \b
    hub train run.yaml                          (publishes local/run, version 0.1.0, then 0.1.1, ...)
    hub train run.yaml lr=1e-4 options.r=16 --name acme/tone@1.0.0
    hub train data.train=notes.txt data.eval=0.1 duration=200 --dry-run
    accelerate launch -m hub.cli train run.yaml

    Spans are steps (200) or epochs ('3 epochs'). The folder keeps the configuration, metrics, curves, log and adapter.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    # OpenMP's threads spin while they wait; where others use the cores too, that makes every step many times slower.
    # It is read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from train.config import read_words

    path, config = read_words(words)
    if dry_run:
        _dry_run(config, json_path)
        return
    from train import run

    outcome = run(
        config,
        folder=out,
        ref=name or (f"local/{_slug(path.stem)}" if path else None),
        publishing=publish,
        resume=resume,
        save_every=save_every,
        license=license_,
        trackers=trackers,
    )
    _report(outcome.as_dict(), json_path)


def _slug(text: str) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "adapter"


def _dry_run(config: TrainConfig, json_path: str | None) -> None:
    from rich.console import Console

    from train import prepare, preview
    from train.dry_run import show

    ready = prepare(config)
    figures = preview(ready)
    if json_path != "-":
        show(figures, ready, Console(highlight=False))
    write_json(figures.as_dict(), json_path)


def _report(facts: dict[str, Any], json_path: str | None) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if json_path != "-":
        best = facts["best"] or {}
        shown = {k: f"{v:.4g}" for k, v in best.items() if k != "step"} or {"last loss": f"{facts['last_loss']:.4g}"}
        click.echo(facts.get("ref", facts["folder"]))
        click.echo("  " + ", ".join(f"{name} {value}" for name, value in shown.items()))
        place = f"best of step {best['step']}" if best else "last state"
        click.echo(f"  {place}; {facts['steps']} steps in {facts['seconds']:.1f} s; folder {facts['folder']}", err=True)
    write_json(facts, json_path)
