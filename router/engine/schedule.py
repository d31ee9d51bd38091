"""Which rows are computed together: of one length, and no more adapters than fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from router.engine.prepare import PreparedRow

BUCKET = 16  # tokens: lengths that differ by less are as good as equal


def batches(
    rows: Sequence[PreparedRow],
    *,
    most: int,
    tokens: int,
    fits: Callable[[Collection[str]], bool],
) -> list[list[int]]:
    """Indices of the rows of each batch, a function of the rows alone.

    Rows of equal length stand together, and among those the ones of one adapter.

    Parameters
    ----------
    most
        Rows in a batch; each expert of an ensemble's row counts as one.
    tokens
        Rows times the longest row's places in a batch, with those that it may write; a row that is longer stands alone.
    fits
        Whether adapters, by name, can be resident together.
    """
    # A function of the rows alone: a run that goes on after an interruption cuts the same batches.
    order = sorted(
        range(len(rows)), key=lambda i: (_apart(rows[i]), -(len(rows[i].ids) // BUCKET), rows[i].target.text, i)
    )
    cut: list[list[int]] = []
    names: set[str] = set()
    for i in order:
        row = rows[i]
        longest = max((rows[k].places for k in cut[-1]), default=0) if cut else 0
        lanes = sum(rows[k].lanes for k in cut[-1]) if cut else 0
        wanted = names | set(row.target.names)
        full = (
            not cut
            or rows[cut[-1][0]].gate is not row.gate
            or _apart(rows[cut[-1][0]]) != _apart(row)
            or lanes + row.lanes > most
            or (lanes + row.lanes) * max(longest, row.places) > tokens
        )
        # A row whose adapters do not fit beside the others' begins a batch of its own.
        if full or (wanted != names and not fits(wanted)):
            cut.append([])
            wanted = set(row.target.names)
        cut[-1].append(i)
        names = wanted
    return cut


def _apart(row: PreparedRow) -> str:
    """Rows of a router that weighs each token, and those of a reader, are computed by themselves."""
    return row.target.text if row.gate is not None or row.target.read is not None else ""
