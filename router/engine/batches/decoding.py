"""Rows that write: side by side over one cache, a token for each of them at every step.

A row takes one lane of the batch, or one for each expert of an ensemble, whose probabilities are mixed before a token
is chosen. Rows of a causal model join between two steps and leave when they have ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compose.expr.tree import Expr
from router.engine.batches.kv_cache import CausalState, DecodingState
from router.engine.batches.running_row import RunningRow
from router.engine.batches.sampling import choose
from router.engine.host import Host
from router.engine.routing import Routing


class DecodingBatch:
    """Rows over one state.

    Attributes
    ----------
    gate
        The router that weighs each of their tokens; None: each row has its own composition.
    """

    def __init__(self, host: Host, gate: Routing | None, rows: Sequence[RunningRow], state: DecodingState) -> None:
        self.host, self.gate, self.state = host, gate, state
        self.rows = list(rows)

    @property
    def running(self) -> int:
        """Rows that have not ended."""
        return sum(not row.over for row in self.rows)

    def choose(self, logits: Tensor) -> None:
        """The next token of each row that goes on, from its lanes' logits (lanes, V)."""
        mixed, top = [], 0
        for row in self.rows:
            lanes = logits[top : top + len(row.decoding)]
            mixed.append(lanes[0] if row.mix is None else row.mix.mix(lanes))
            top += len(lanes)
        scores = logits.float() if len(logits) == len(self.rows) else torch.stack([m.float() for m in mixed])
        tokens = choose(scores, [None if row.over else row.sampler for row in self.rows])
        for row, token, its in zip(self.rows, tokens, scores, strict=True):
            if token is None:
                row.fail()
            elif not row.over:
                row.take(token, its, self.host.ends)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        self.compact()
        if not self.rows:
            return
        activate(self.host, self.gate, [lane for row in self.rows for lane in row.decoding])
        last = [row.last for row in self.rows for _ in row.decoding]
        self.choose(self.state.step(self.host, last))

    @torch.inference_mode()
    def join(self, other: DecodingBatch) -> None:
        """Take another's rows beside these, which the states of both must allow."""
        self.compact(every=True)
        other.compact(every=True)
        if not self.rows or not other.rows:
            if other.rows:
                self.rows, self.state = other.rows, other.state
            return
        assert isinstance(self.state, CausalState) and isinstance(other.state, CausalState)  # noqa: S101 - as they join
        self.rows += other.rows
        self.state.add(other.state, longest(self.rows))

    @torch.inference_mode()
    def compact(self, *, every: bool = False) -> None:
        """Leave out rows that have ended: at once where that is worth it, as what is active is laid out anew then."""
        kept = [i for i, row in enumerate(self.rows) if not row.over]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.rows = []
            return
        tops = [0]
        for row in self.rows:
            tops.append(tops[-1] + len(row.decoding))
        lanes = [lane for i in kept for lane in range(tops[i], tops[i + 1])]
        most = longest([self.rows[i] for i in kept])
        left = len(lanes) * (self.state.width - self.state.empty_in_front(lanes))
        worth = 4 * left <= 3 * tops[-1] * self.state.width or self.state.width >= most
        if getattr(self.state, "prompted", False) or not (every or worth):
            return
        self.state.keep(lanes, most)
        self.rows = [self.rows[i] for i in kept]


def longest(rows: Sequence[RunningRow]) -> int:
    """The most places that one of the rows may take."""
    return max(row.prepared.places for row in rows)


def activate(host: Host, gate: Routing | None, lanes: Sequence[Expr]) -> None:
    """Make active what is applied to each lane."""
    if gate is None:
        host.activate(lanes)
    else:
        gate.activate(host)
