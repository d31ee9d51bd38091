"""Which rows are computed together: of one length, and no more adapters than fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from router.engine.prepare import Prepared

BUCKET = 16  # tokens: lengths that differ by less are as good as equal


def batches(
    rows: Sequence[Prepared],
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
        Rows in a batch.
    tokens
        Rows times the longest row's tokens in a batch; a row that is longer stands alone.
    fits
        Whether adapters, by name, can be resident together.
    """
    order = sorted(
        range(len(rows)), key=lambda i: (_apart(rows[i]), -(len(rows[i].ids) // BUCKET), rows[i].target.text, i)
    )
    found: list[list[int]] = []
    names: set[str] = set()
    for i in order:
        row = rows[i]
        longest = max((len(rows[k].ids) for k in found[-1]), default=0) if found else 0
        wanted = names | set(row.target.names)
        full = (
            not found
            or rows[found[-1][0]].gate is not row.gate
            or len(found[-1]) == most
            or (len(found[-1]) + 1) * max(longest, len(row.ids)) > tokens
        )
        if full or (wanted != names and not fits(wanted)):
            found.append([])
            wanted = set(row.target.names)
        found[-1].append(i)
        names = wanted
    return found


def _apart(row: Prepared) -> str:
    """Rows of a router that weighs each token are computed by themselves."""
    return row.target.text if row.gate is not None else ""
