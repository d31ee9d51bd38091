"""``hub diff``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import columns, json_option, print_json, say

if TYPE_CHECKING:
    from hub.relations.diff import Change, Diff

_SHOWN = 20  # tensors that are listed, the most changed first


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--all", "everything", is_flag=True, help="List every changed tensor, in order.")
@json_option
def diff(a: str, b: str, everything: bool, as_json: bool) -> None:
    """Show what differs between two adapters: config, facts, tensors, metrics, files.

    \b
    hub diff acme/tone@1.0.0 acme/tone@1.1.0
    hub diff acme/tone ./tone-retrained --json

    A and B are refs of the store or adapter directories, PEFT's included. A tensor that changed is shown with
    ||B - A||, that over ||A||, the cosine between the two and the largest change of a number.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub

    difference = hub.diff(a, b)
    if as_json:
        print_json(difference.as_dict())
        return
    for line in _lines(difference, everything):
        click.echo(line)
    if difference.empty:
        say(f"{difference.a} and {difference.b} are the same in all that counts")


def _lines(difference: Diff, everything: bool) -> Iterator[str]:
    yield f"--- {difference.a}"
    yield f"+++ {difference.b}"
    yield from _pairs("config", difference.config)
    yield from _pairs("facts", difference.facts)
    yield from _tensors(difference, everything)
    if difference.metrics:
        rows = [(m.dataset, m.split, m.metric, *_figures(m.before, m.after)) for m in difference.metrics]
        yield "\n" + columns(("DATASET", "SPLIT", "METRIC", "A", "B", "B - A"), rows)
    yield from _pairs("files", {name: (_short(x), _short(y)) for name, (x, y) in difference.files.items()})


def _pairs(title: str, pairs: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    if pairs:
        yield "\n" + columns((title.upper(), "A", "B"), [(name, _word(x), _word(y)) for name, (x, y) in pairs.items()])


def _tensors(difference: Diff, everything: bool) -> Iterator[str]:
    if difference.added or difference.removed or difference.changed:
        yield (
            f"\n{len(difference.changed)} tensors changed, {len(difference.added)} added, "
            f"{len(difference.removed)} removed, {difference.same} equal"
        )
    yield from (f"+ {name}" for name in difference.added)
    yield from (f"- {name}" for name in difference.removed)
    shown = difference.changed if everything else sorted(difference.changed, key=_size, reverse=True)[:_SHOWN]
    if shown:
        yield columns(("TENSOR", "SHAPE", "||B - A||", "RELATIVE", "COSINE", "LARGEST"), map(_row, shown))
    if len(shown) < len(difference.changed):
        yield f"... and {len(difference.changed) - len(shown)} more (--all)"


def _size(change: Change) -> float:
    if change.distance is None or change.distance.relative is None:
        return float("inf")
    return change.distance.relative


def _row(change: Change) -> tuple[str, ...]:
    (before, after), (old, new) = change.shapes, change.dtypes
    shape = "x".join(map(str, before)) + ("" if before == after else f" -> {'x'.join(map(str, after))}")
    shape += "" if old == new else f" {old} -> {new}"
    d = change.distance
    if d is None:
        return change.name, shape, "", "", "", ""
    relative, cosine = ("-" if value is None else f"{value:.4g}" for value in (d.relative, d.cosine))
    return change.name, shape, f"{d.difference:.4g}", relative, cosine, f"{d.largest:.4g}"


def _figures(before: float | None, after: float | None) -> tuple[str, str, str]:
    a, b = ("-" if value is None else f"{value:.4g}" for value in (before, after))
    return a, b, "-" if before is None or after is None else f"{after - before:+.4g}"


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest[:12]


def _word(value: object) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
