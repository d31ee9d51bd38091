"""``hub compose doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from compose.commands._options import base_option
from hub.console.output import columns, json_option, print_json, say
from hub.console.progress import steps_bar

if TYPE_CHECKING:
    from compose.inspection.merge_doctor import Diagnosis

_SHOWN = 12  # sites that are listed, the worst first


class Several(click.Command):
    """A command whose ``several`` options take all words up to the next option: ``--members A B C``."""

    several = ("--members", "--weights")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its words, as click wants it."""
        spread: list[str] = []
        current: str | None = None
        for word in args:
            if word in self.several:
                current = word
            elif current is not None and not (word.startswith("-") and not _number(word)):
                spread += [current, word]
            else:
                current = None
                spread.append(word)
        return super().parse_args(ctx, spread)


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@click.command(cls=Several)
@click.argument("result", metavar="DIR|REF")
@click.option("--members", multiple=True, required=True, metavar="A B ...", help="What it was merged from.")
@click.option("--weights", multiple=True, type=float, metavar="W ...", help="One a member [a mean: 1 / N each].")
@click.option("--method", default="task_arithmetic", show_default=True, help="The merge it was meant to be.")
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), help="Of methods that prune.")
@base_option
@click.option("--tolerance", type=float, default=1e-3, show_default=True, help="Relative error that counts as exact.")
@click.option("--all", "everything", is_flag=True, help="List every site, in order.")
@json_option
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    result: str,
    members: tuple[str, ...],
    weights: tuple[float, ...],
    everything: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Recompute a merge exactly and show what is wrong in the one at hand; exit 1 if anything is.

    \b
    hub compose doctor ./merged --members ./a ./b --weights 0.5 0.5
    hub compose doctor ./merged --members acme/a acme/b --method ties --density 0.2

    DIR is an adapter directory that PEFT's add_weighted_adapter, an average, or anyone has made; members are
    directories or refs. Known mistakes are named: A and B merged apart, a scale kept from rsLoRA, a mean divided
    twice. The base is needed for DoRA only.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from compose.verbs import diagnose

    with steps_bar() as progress:
        diagnosis = diagnose(result, members, weights=weights or None, progress=progress, **options)
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        _tell(diagnosis, everything)
    if not diagnosis.sound:
        ctx.exit(1)


def _tell(diagnosis: Diagnosis, everything: bool) -> None:
    chosen = diagnosis.sites if everything else sorted(diagnosis.sites, key=lambda site: -site.error)[:_SHOWN]
    rows = [(s.path, f"{s.error:.2e}", f"{s.factor:.4g}", f"{s.cosine:.4f}", f"{s.norm:.4g}") for s in chosen]
    click.echo(columns(("SITE", "ERROR", "FACTOR", "COSINE", "NORM"), rows))
    if len(chosen) < len(diagnosis.sites):
        say(f"... and {len(diagnosis.sites) - len(chosen)} more sites (--all)")
    asked = " + ".join(f"{w:.4g} * {m}" for w, m in zip(diagnosis.weights, diagnosis.members, strict=True))
    click.echo(f"\nmeant:    {diagnosis.method} of {asked}")
    click.echo(
        "fits:     " + " + ".join(f"{v:.4g} * {m}" for v, m in zip(diagnosis.fitted, diagnosis.members, strict=True))
    )
    click.echo(f"error:    {diagnosis.error:.2e} of the exact merge ({'sound' if diagnosis.sound else 'not sound'})")
    if diagnosis.recipe is not None:
        click.echo(f"made by:  {diagnosis.recipe} (reproduces it to {diagnosis.recipe_error:.0e})")
    for finding in diagnosis.findings:
        click.echo(f"finding:  {finding}")
    if not diagnosis.sound:
        say(f"the exact merge: {diagnosis.remedy}")
