"""From weights to what `compose.activate` takes: one composition per row, all rows in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compose.algebra import parse
from compose.expr.tree import Add, Expr, Scale


def row_expressions(experts: Sequence[Expr | str], weights: Tensor) -> list[Expr | None]:
    """Expression of each row, `sum_e w_e e` over its non-zero weights (B, E).

    A row with all its weight on one expert is that expert itself, so it computes exactly what the expert computes;
    a row of zeros is the bare base. Nothing is sorted or grouped: row b of the batch is entry b of the list.

    >>> compose.activate(model, row_expressions(experts, gate(TaskScorer(experts)(["mail", "code"]))))
    """
    trees = [parse(expert) if isinstance(expert, str) else expert for expert in experts]
    rows: list[Expr | None] = []
    for row in weights.tolist():
        terms = [tree if w == 1.0 else Scale(w, tree) for w, tree in zip(row, trees, strict=True) if w != 0.0]
        rows.append(Add(terms) if len(terms) > 1 else terms[0] if terms else None)
    return rows
