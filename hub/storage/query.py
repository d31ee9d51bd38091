"""Filters of `Store.list` as SQL conditions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hub.errors import UsageError, suggest
from hub.ref import name_key

_Term = tuple[str, tuple[object, ...]]


def _column(name: str) -> Callable[[str], _Term]:
    return lambda value: (f"a.{name} = ?", (value,))


def _facet(name: str) -> Callable[[str], _Term]:
    inside = "a.id IN (SELECT artifact FROM facets WHERE facet = ? AND value = ?)"
    return lambda value: (inside, (name, value))


def _name(value: str) -> _Term:
    if any(mark in value for mark in "*?["):
        return "lower(a.name) GLOB ?", (name_key(value if "/" in value else f"*/{value}"),)
    if "/" in value:
        return "a.name = ?", (value,)
    return "lower(substr(a.name, instr(a.name, '/') + 1)) = ?", (name_key(value),)


def _namespace(value: str) -> _Term:
    return "(a.name >= ? AND a.name < ?)", (f"{value}/", f"{value}0")  # '0' comes right after '/'


def _base(value: str) -> _Term:
    if value.startswith("sha256:"):
        return "(a.base_weights = ? OR a.base_arch = ?)", (value, value)
    return "a.base_repo = ?", (value,)


def match(text: str) -> str:
    """FTS5 expression for words that all must occur, each as a beginning. Raises UsageError where there is none."""
    words = re.findall(r"\w+", text)
    if not words:
        raise UsageError(f"{text!r} holds no word to search for", hint="hub list shows everything")
    return " ".join(f'"{word}"*' for word in words)


def _text(value: str) -> _Term:
    return "a.id IN (SELECT rowid FROM search WHERE search MATCH ?)", (match(value),)


_BOUND = re.compile(r"(?P<metric>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<value>[-+.\deE]+)\Z")


def _metric(value: str) -> _Term:
    """``accuracy``, or ``accuracy>=0.8``."""
    match = _BOUND.match(value)
    if match is None and not re.search("[<>]", value):
        return "a.id IN (SELECT artifact FROM metrics WHERE metric = ?)", (value,)
    try:
        bound = float(match["value"]) if match else None
    except ValueError:
        bound = None
    if match is None or bound is None:
        raise UsageError(f"{value!r} is no bound of a metric", hint="write accuracy, 'accuracy>=0.8' or 'loss<2'")
    inside = f"a.id IN (SELECT artifact FROM metrics WHERE metric = ? AND value {match['sign']} ?)"  # noqa: S608
    return inside, (match["metric"], bound)


def _alias(value: str) -> _Term:
    return "a.digest IN (SELECT digest FROM aliases WHERE alias = ?)", (value,)


_FILTERS: dict[str, Callable[[str], _Term]] = {
    "name": _name,
    "namespace": _namespace,
    "version": _column("version"),
    "digest": _column("digest"),
    "type": _column("type"),
    "kind": _column("kind"),
    "method": _column("method"),
    "task": _column("task"),
    "license": _column("license"),
    "base": _base,
    "label": _facet("label"),
    "language": _facet("language"),
    "domain": _facet("domain"),
    "alias": _alias,
    "metric": _metric,
    "text": _text,
}
ORDERS = {"name": "a.name, a.version_key", "created": "a.created DESC, a.id DESC", "size": "a.size DESC, a.name"}
_LOW = re.compile("loss|perplexity|error|ece|brier", re.I)
_LEAST = "(SELECT min(value) FROM metrics WHERE artifact = a.id AND metric = ?) ASC"
_GREATEST = "(SELECT max(value) FROM metrics WHERE artifact = a.id AND metric = ?) DESC"
# The artifacts with the best figures, in the order of the index by value: each at its own best figure alone.
_BEST = """a.id IN (SELECT a.id FROM metrics m CROSS JOIN artifacts a ON a.id = m.artifact
    WHERE m.metric = ? AND {where} AND NOT EXISTS (SELECT 1 FROM metrics n WHERE n.metric = m.metric
        AND n.artifact = m.artifact AND (n.value {better} m.value OR n.value = m.value AND n.rowid < m.rowid))
    ORDER BY m.value {order} LIMIT ?)"""
_AHEAD = {True: {"better": "<", "order": "ASC"}, False: {"better": ">", "order": "DESC"}}
_NEWEST = """a.version_key = (SELECT max(b.version_key) FROM artifacts b WHERE b.name = a.name
    AND (b.yanked IS NULL OR ?))"""


def low_is_good(metric: str, ascending: bool | None = None) -> bool:
    """Whether the least value of a metric is the best: as told, else by its name."""
    return ascending if ascending is not None else bool(_LOW.search(metric))


def build(
    filters: dict[str, Any],
    *,
    yanked: bool,
    newest: bool,
    sort: str | None,
    ascending: bool | None,
    limit: int | None = None,
) -> tuple[str, list[object], str]:
    """SQL condition, its arguments and the order.

    Parameters
    ----------
    filters
        Name -> value; those that are None are left out.
    yanked
        Whether yanked releases are shown.
    newest
        Only the highest version of each name.
    sort
        ``name``, ``created``, ``size``, or a metric's name (the best value first).
    ascending
        For a metric: whether the least value is the best (perplexity, loss). None guesses by its name.
    limit
        How many are wanted at most; the condition may then hold for these alone.

    Raises
    ------
    UsageError
        An unknown filter, with did-you-mean.
    """
    # Each filter is a condition with its arguments, in this order.
    terms, arguments = list[str](), list[object]()
    for name, value in filters.items():
        if name not in _FILTERS:
            raise UsageError(f"there is no filter {name!r}", hint=suggest(name, _FILTERS))
        if value is not None:
            term, values = _FILTERS[name](str(value))
            terms.append(term)
            arguments += values
    if not yanked:
        terms.append("a.yanked IS NULL")
    if newest:
        terms.append(_NEWEST)
        arguments.append(yanked)
    # By a metric: only what has that figure, the best first.
    order = ORDERS.get(sort or "name")
    if order is None:
        low = low_is_good(str(sort), ascending)
        if limit is None or any(value is not None for value in filters.values()):
            terms.append("EXISTS (SELECT 1 FROM metrics WHERE metric = ? AND artifact = a.id)")
            arguments.append(sort)
        else:  # few rows of the index of figures are enough, where no filter takes most of them out again
            terms = [_BEST.format(where=" AND ".join(terms) or "1", **_AHEAD[low])]
            arguments = [sort, *arguments, limit]
        arguments.append(sort)
        order = _LEAST if low else _GREATEST
    return " AND ".join(terms) or "1", arguments, order
