"""What the quickstart prints to stdout."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from train.quickstart.findings import claims, hindsight, table
from train.quickstart.story import Story

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_LEVELS = " ▁▂▃▄▅▆▇█"
_BUCKETS = 64


def show(story: Story, console: Console) -> None:
    """Print the table of perplexities, the stream, and the claims."""
    console.print(perplexities(story))
    console.print(stream(story))
    console.print(Group(*(_line(claim.text, claim.holds) for claim in claims(story))))


def perplexities(story: Story) -> Table:
    """Ways to predict as rows, domains as columns; the best of a column is bold."""
    found = Table(title="Perplexity per token, held-out documents", title_justify="left")
    found.add_column("")
    for name in [*(result.name for result in story.results), "mean"]:
        found.add_column(name, justify="right")
    experts = len(story.experts)
    for number, row in enumerate(table(story)):
        cells = [Text(f"{v:.2f}", "bold" if low else "") for v, low in zip(row.values, row.lowest, strict=True)]
        found.add_row(row.label, *cells, end_section=number in (0, experts))
    found.add_section()
    found.add_row("best expert in hindsight", *(f"{value:.2f}" for value in hindsight(story)), style="dim")
    return found


def stream(story: Story) -> Group:
    """Perplexities on the streams, and the first one's posterior path as a row of bars for each expert."""
    found = story.stream
    figures = Table(title=f"Streams whose domain changes (gamma {found.gamma:g})", title_justify="left")
    singles = min(found.experts, key=found.experts.__getitem__)
    columns = {
        "base": found.base,
        f"best expert ({singles})": found.experts[singles],
        "average": found.average,
        "uniform": found.uniform_ensemble,
        "DEMix": found.demix,
    }
    for name in columns:
        figures.add_column(name, justify="right")
    figures.add_row(*(f"{value:.2f}" for value in columns.values()))
    path = found.paths[found.gamma]
    width = max(len(name) for name in found.experts)
    lines = [Text(f"{'text':>{width}} ", style="dim") + _segments(found.domains, found.borders, len(path), story)]
    for index, name in enumerate(found.experts):
        weights = path[:, index]
        buckets = [float(bucket.mean()) for bucket in weights.tensor_split(min(_BUCKETS, len(weights)))]
        bars = "".join(_LEVELS[round(weight * (len(_LEVELS) - 1))] for weight in buckets)
        lines.append(Text(f"{name:>{width}} ") + Text(bars, style=COLOURS[index % len(COLOURS)]))
    return Group(figures, *lines)


def _segments(domains: Sequence[str], borders: Sequence[int], length: int, story: Story) -> Text:
    """Names of the stream's domains, each over its stretch."""
    order = list(story.stream.experts)
    buckets = min(_BUCKETS, length)
    ends = [*borders[1:], length]
    text = Text()
    for name, start, end in zip(domains, borders, ends, strict=True):
        cells = round(end * buckets / length) - round(start * buckets / length)
        label = f"|{name}"[:cells].ljust(cells)
        text.append(label, style=COLOURS[order.index(name) % len(COLOURS)])
    return text


def _line(claim: str, holds: bool) -> Text:
    mark = Text("✓ ", style="green") if holds else Text("✗ ", style="bold red")
    return mark + Text(claim)
