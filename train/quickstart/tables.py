"""What the quickstart prints to stdout."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from train.quickstart.findings import claims, means
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
    mean, results = means(story), story.results
    rows: list[tuple[str, list[float]]] = [("base", [*(r.base for r in results), mean["base"]])]
    for name in mean["experts"]:
        rows.append((f"expert {name}", [*(r.experts[name] for r in results), mean["experts"][name]]))
    rows.append(("average of weights", [*(r.average for r in results), mean["average"]]))
    rows.append(("uniform ensemble", [*(r.uniform_ensemble for r in results), mean["uniform_ensemble"]]))
    rows.append(("DEMix posterior", [*(r.demix for r in results), mean["demix"]]))
    best = [*(r.best_expert for r in results), mean["best_expert"]]
    table = Table(title="Perplexity per token, held-out documents", title_justify="left")
    table.add_column("")
    for name in [*(r.name for r in results), "mean"]:
        table.add_column(name, justify="right")
    lowest = [min(values[i] for _, values in rows) for i in range(len(best))]
    for label, values in rows:
        cells = [Text(f"{v:.2f}", style="bold" if v == low else "") for v, low in zip(values, lowest, strict=True)]
        table.add_row(label, *cells, end_section=label in ("base", rows[-4][0]))
    table.add_section()
    table.add_row("best expert in hindsight", *(f"{value:.2f}" for value in best), style="dim")
    return table


def stream(story: Story) -> Group:
    """Perplexities on the streams, and the first one's posterior path as a row of bars for each expert."""
    found = story.stream
    table = Table(title=f"Streams whose domain changes (gamma {found.gamma:g})", title_justify="left")
    singles = min(found.experts, key=found.experts.__getitem__)
    columns = {
        "base": found.base,
        f"best expert ({singles})": found.experts[singles],
        "average": found.average,
        "uniform": found.uniform_ensemble,
        "DEMix": found.demix,
    }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.2f}" for value in columns.values()))
    path = found.paths[found.gamma]
    width = max(len(name) for name in found.experts)
    lines = [Text(f"{'text':>{width}} ", style="dim") + _segments(found.domains, found.borders, len(path), story)]
    for index, name in enumerate(found.experts):
        weights = path[:, index]
        buckets = [float(bucket.mean()) for bucket in weights.tensor_split(min(_BUCKETS, len(weights)))]
        bars = "".join(_LEVELS[round(weight * (len(_LEVELS) - 1))] for weight in buckets)
        lines.append(Text(f"{name:>{width}} ") + Text(bars, style=COLOURS[index % len(COLOURS)]))
    return Group(table, *lines)


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
