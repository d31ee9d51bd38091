"""Rows of an artifact that answers through its reader: read together, some in each turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from router.engine.batches.running_row import RunningRow
from router.engine.readers import Scored
from router.engine.request import Result


class ReaderRows:
    """Rows of one reader, with what `prefill.Reading` tells of its own.

    Attributes
    ----------
    rows
        Those that are read.
    """

    gate: ClassVar[None] = None
    batch: ClassVar[None] = None
    bytes: ClassVar[int] = 0
    generates: ClassVar[bool] = False

    def __init__(self, rows: Sequence[RunningRow], *, steady: bool = False) -> None:
        self.rows, self.steady = list(rows), steady
        self._read = 0

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return sum(len(row.prepared.ids) for row in self.rows[self._read :])

    def advance(self, tokens: int) -> bool:
        """Read rows of about so many tokens more; whether all is read. Raises what the reader refuses."""
        longest = max(len(row.prepared.ids) for row in self.rows)
        part = self.rows[self._read : self._read + max(1, tokens // longest)]
        read = part[0].prepared.target.read
        assert read is not None  # noqa: S101 - rows of a reader are read by themselves
        said = read([(row.prepared.request.text, row.prepared.request.pair) for row in part])
        for row, scored in zip(part, said, strict=True):
            if bool(scored.scores.isnan().any()):
                row.fail()
            else:
                row.result = _result(row, scored)
        self._read += len(part)
        return self._read == len(self.rows)


def _result(row: RunningRow, scored: Scored) -> Result:
    prepared = row.prepared
    target = prepared.target
    told: dict[str, Any] = {"read": len(prepared.ids), "adapter": target.text, "digest": target.digest}
    if target.task == "regress":
        return Result(value=float(scored.scores[0]), **told)
    p, order = scored.scores.double().sort(descending=True, stable=True)
    named = [(target.labels[i], float(q)) for q, i in zip(p.tolist(), order.tolist(), strict=True)]
    told["scores"] = tuple(named[: prepared.request.scores])
    if target.several:
        return Result(labels=scored.labels, **told)
    return Result(label=scored.labels[0], **told)
