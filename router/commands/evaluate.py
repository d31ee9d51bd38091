"""``hub route eval``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.console.output import columns, json_file_option, say, write_json
from hub.console.progress import steps_bar
from router.commands._options import base_options, named_files, text_options

if TYPE_CHECKING:
    from router.evaluation.measure import Report


@click.command(name="eval")
@click.argument("router", metavar="ROUTER")
@click.option("--data", "data", multiple=True, required=True, metavar="NAME=FILE", help="A set of rows (repeat).")
@click.option(
    "--dev",
    multiple=True,
    metavar="NAME=FILE",
    help="Rows like a set's, for a likelihood router's prior on it.",
)
@click.option(
    "--prompt-tokens",
    "prompts",
    multiple=True,
    type=click.IntRange(1),
    metavar="N",
    help="Choose by the first N tokens and measure what follows (repeat) [32].",
)
@text_options
@base_options
@json_file_option
@click.option("--plot", type=click.Path(dir_okay=False), help="Write the confusion of routing as SVG.")
def evaluate(
    router: str, data: tuple[str, ...], dev: tuple[str, ...], json_path: str | None, plot: str | None, **given: Any
) -> None:
    """Measure a router on named sets of rows: perplexity, or accuracy where its members classify.

    \b
    hub route eval acme/near --data law=test-law.jsonl --data novel=other.jsonl --plot confusion.svg
    hub route eval acme/demix --data novel=test.jsonl --dev novel=valid.jsonl

    What is measured is what `hub run` and `hub serve` answer with. A text is continued with the weights that its first
    N tokens give, and what follows them is measured (of texts that are no longer, their second half); a row to
    classify is read whole.

    The figures stand beside the bare base, the one adapter that is best over all sets, all adapters averaged (for
    perplexity also their probabilities: uniform; of a likelihood router their mixture by the running posterior: demix),
    and the oracle: the adapter of the set's name, or for another name
    the one that does best on it.
    """  # noqa: D301
    from router.api import evaluate as evaluate_router
    from router.evaluation.pictures import heatmap

    with steps_bar() as progress:
        report = evaluate_router(router, named_files(data), dev=named_files(dev), progress=progress, **given)
    if plot:
        experts = list(next(iter(report.confusion.values())))
        values = [[row[e] for e in experts] for row in report.confusion.values()]
        picture = heatmap(f"{router}: mean weight of each adapter", list(report.confusion), experts, values)
        Path(plot).write_text(picture, encoding="utf-8")
        say(f"wrote {plot}")
    write_json(_finite({"router": router, **report.as_dict()}), json_path)
    if json_path != "-":
        _print(report)


def _print(report: Report) -> None:
    def text(value: float) -> str:
        if math.isnan(value):
            return "-"
        return f"{value:.2f}" if report.metric == "perplexity" else f"{100 * value:.1f}%"

    prompts = ("prompt_tokens",) if report.metric == "perplexity" else ()
    rows = [
        (row["set"], *(str(row[p]) for p in prompts), *(text(row[way]) for way in report.ways), row["expert"])
        for row in report.rows
    ]
    click.echo(columns((report.metric.upper(), *("prompt" for _ in prompts), *report.ways, "oracle is"), rows))
    experts = list(next(iter(report.confusion.values())))
    click.echo()
    weights = [(name, *(f"{w[e]:.2f}" for e in experts)) for name, w in report.confusion.items()]
    click.echo(columns(("MEAN WEIGHT", *experts), weights))
    say(f"measured: {report.measured}")
    say(f"best single over all sets: {report.best_single}")


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that does not exist is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
