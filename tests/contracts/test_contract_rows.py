"""A row of a mixed batch is the row alone, whatever stands beside it and on whichever side it is padded."""

from __future__ import annotations

import pytest
import torch

from compose.runtime.model_runtime import activate, eject

LENGTHS = (5, 3, 6, 4, 2, 5)


def expressions(kind: str) -> list[str | None]:
    """One composition a row: other adapters, other sizes, other kinds, none, sums, weights, sequences."""
    weighted = "b" if kind == "prompt" else "0.5 * b"  # a prompt is there or not, it has no half
    return ["a", None, "b", "a + l", "l >> a", weighted]


@pytest.fixture
def mixed(tiny, kind, family, dtype):
    model = tiny.model(family, dtype)
    tiny.adapter(model, kind, "a").freeze()
    tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    tiny.adapter(model, "lora", "l", seed=3, target_modules="all-linear").freeze()
    return model


def alone(tiny, model, family, rows, exprs):
    """Each row without a neighbour and without padding."""
    outputs = []
    for row, expr in zip(rows, exprs, strict=True):
        activate(model, expr)
        outputs += tiny.logits(model, tiny.batch(family, [row]))
    return outputs


def test_rows_are_independent(tiny, close, mixed, kind, family, dtype):
    rows, exprs = tiny.rows(*LENGTHS), expressions(kind)
    single = alone(tiny, mixed, family, rows, exprs)
    activate(mixed, exprs)
    for side in ("right", "left"):
        close(tiny.logits(mixed, tiny.batch(family, rows, side)), single, dtype)

    twice = [row for row in rows for _ in range(2)]  # beams and folded experts: k rows for each expression
    close(tiny.logits(mixed, tiny.batch(family, twice)), [y for y in single for _ in range(2)], dtype)

    if kind != "prompt":
        activate(mixed, "a + b", weights={"a": torch.tensor([1.0, 0.25, 0.0]), "b": torch.tensor([0.0, 0.5, 0.0])})
        weighted = alone(tiny, mixed, family, rows[:3], ["a", "0.25 * a + 0.5 * b", None])
        activate(mixed, "a + b", weights={"a": torch.tensor([1.0, 0.25, 0.0]), "b": torch.tensor([0.0, 0.5, 0.0])})
        close(tiny.logits(mixed, tiny.batch(family, rows[:3], "left")), weighted, dtype)
    eject(mixed)
