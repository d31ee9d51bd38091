"""``hub compose map``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compose.commands._options import base_option
from hub.console.output import columns, json_option, print_json, say
from hub.console.progress import steps_bar

if TYPE_CHECKING:
    from compose.merging.interference import Interference


@click.command("map")
@click.argument("adapters", nargs=-1, required=True, metavar="A B...")
@base_option
@click.option("--sites", "by_site", is_flag=True, help="The cosines at each site, too (with --json).")
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Draw the heat map (.svg, .png or .pdf).")
@json_option
def map_(adapters: tuple[str, ...], base: str | None, by_site: bool, svg: Path | None, as_json: bool) -> None:
    """Show how adapters interfere: the cosine of what they change, pair by pair.

    \b
    hub compose map acme/tone acme/law ./peft-dir
    hub compose map $(hub list 'acme/*' --json | jq -r '.[].ref') --svg map.svg

    1: adding both doubles the effect. 0: each leaves the other alone. -1: they cancel. Plain LoRAs are compared in
    factor space without their base; other kinds need it.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from compose.verbs import interference

    with steps_bar() as progress:
        measured = interference(adapters, base=base, progress=progress)
    if svg is not None:
        replace(measured, names=_short(measured.names)).heatmap(svg)
        say(f"heat map in {svg}")
    if as_json:
        print_json({**measured.as_dict(), **_more(measured, by_site)})
        return
    click.echo(_matrix(measured))
    click.echo("\n" + columns(("ADAPTER", "NORM", "NEAREST", "COSINE"), _nearest(measured)))
    for a, b, distance in measured.duplicates():
        say(f"{a} and {b} do the same (relative distance {distance:.1e})")


def _short(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that fit beside a plot: the last part of a path, where that is not ambiguous."""
    ends = tuple(Path(name).name if Path(name).is_dir() else name for name in names)
    return ends if len(set(ends)) == len(names) else names


def _matrix(measured: Interference) -> str:
    rows = [
        (f"{i + 1}", name, *(f"{value:+.3f}" for value in row))
        for i, (name, row) in enumerate(zip(measured.names, measured.cosine.tolist(), strict=True))
    ]
    return columns(("#", "COSINE", *(str(i + 1) for i in range(len(measured.names)))), rows)


def _nearest(measured: Interference) -> list[tuple[str, str, str, str]]:
    norms = measured.norms.tolist()
    near = [measured.nearest(name, 1)[0] for name in measured.names]
    return [
        (name, f"{norm:.4g}", other, f"{cosine:+.3f}")
        for name, norm, (other, cosine) in zip(measured.names, norms, near, strict=True)
    ]


def _more(measured: Interference, by_site: bool) -> dict[str, object]:
    nearest = {name: [{"name": other, "cosine": c} for other, c in measured.nearest(name)] for name in measured.names}
    sites = {place: measured.cosine_at(place).tolist() for place in measured.by_place}
    return {"nearest": nearest, **({"sites": sites} if by_site else {})}
