"""``hub route eval``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.console.output import columns, json_file_option, say, write_json
from router.commands._options import Told, bar, base_options, load_with_members, text_options

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

    The figures stand beside the bare base, the one adapter that is best over all sets, all adapters averaged (for
    perplexity also their probabilities: uniform), and the oracle: the adapter of the set's name, or for another name
    the one that does best on it.
    """  # noqa: D301
    from router.evaluation.pictures import heatmap
    from router.evaluation.texts import named_files, read_texts

    sets, more = (
        {name: read_texts(file, most=given["max_rows"]) for name, file in named_files(pairs).items()}
        for pairs in (data, dev)
    )
    with bar() as told:
        found = _measure(router, sets, more, given, told)
    if plot:
        experts = list(next(iter(found.confusion.values())))
        values = [[row[e] for e in experts] for row in found.confusion.values()]
        picture = heatmap(f"{router}: mean weight of each adapter", list(found.confusion), experts, values)
        Path(plot).write_text(picture, encoding="utf-8")
        say(f"wrote {plot}")
    write_json(_finite({"router": router, **found.as_dict()}), json_path)
    if json_path != "-":
        _print(found)


def _measure(router: str, sets: Any, dev: Any, given: dict[str, Any], told: Told | None) -> Report:
    from hub.errors import UsageError, suggest
    from router.artifact import load
    from router.evaluation.measure import Labelled, accuracies, perplexities
    from router.evaluation.texts import encode

    stored = load(router)
    if dev and stored.router.scorer.name != "likelihood":
        raise UsageError(f"{router} is a {stored.router.scorer.name} router and has no prior", hint="leave --dev out")
    if wrong := [name for name in dev if name not in sets]:
        raise UsageError(f"--dev has rows for {wrong[0]!r}, and --data none", hint=suggest(wrong[0], sets))
    tasks = {artifact.manifest.task or "causal_lm" for artifact in stored.artifacts.values()}
    if tasks not in ({"causal_lm"}, {"classification"}):
        raise UsageError(
            f"the members are for {' and '.join(sorted(tasks))}: neither perplexity nor accuracy is theirs"
        )
    model, tokenizer = load_with_members(stored.artifacts, given)
    most, pad = given["max_length"], tokenizer.pad_token_id or 0
    if tasks == {"causal_lm"}:
        rows, held = (
            {name: encode(tokenizer, [row.text for row in found], most=most) for name, found in files.items()}
            for files in (sets, dev)
        )
        return perplexities(stored.router, model, rows, dev=held, pad=pad, told=told)
    labelled = {}
    for name, found in sets.items():
        if bare := [i for i, row in enumerate(found, 1) if row.label is None]:
            raise UsageError(f"row {bare[0]} of {name!r} has no label", hint='rows are {"text": "...", "label": "..."}')
        encoded = [encode(tokenizer, [row.text], most=most) for row in found]
        kept = [(ids[0], row.label) for ids, row in zip(encoded, found, strict=True) if ids]
        labelled[name] = Labelled([r for r, _ in kept], [str(label) for _, label in kept])
    classes = {name: artifact.manifest.labels for name, artifact in stored.artifacts.items()}
    return accuracies(stored.router, model, labelled, classes, pad=pad, told=told)


def _print(found: Report) -> None:
    def text(value: float) -> str:
        if math.isnan(value):
            return "-"
        return f"{value:.2f}" if found.metric == "perplexity" else f"{100 * value:.1f}%"

    rows = [(row["set"], *(text(row[way]) for way in found.ways), row["expert"]) for row in found.rows]
    click.echo(columns((found.metric.upper(), *found.ways, "oracle is"), rows))
    experts = list(next(iter(found.confusion.values())))
    click.echo()
    weights = [(name, *(f"{w[e]:.2f}" for e in experts)) for name, w in found.confusion.items()]
    click.echo(columns(("MEAN WEIGHT", *experts), weights))
    say(f"best single over all sets: {found.best_single}")


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that does not exist is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
