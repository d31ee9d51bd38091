"""Rows that end in a head: those of one head go through it together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hub.errors import HubError
from router.engine.batches.running_row import RunningRow
from router.engine.host import Host
from router.engine.prepare import PreparedRow
from router.engine.request import Result
from router.engine.row_heads import blend, heads_of, pick


def apply_heads(host: Host, rows: Sequence[RunningRow], output: Any, mask: Tensor, *, last: bool) -> None:
    """Results of the rows that end in a head: rows of one head go through it together."""
    active = host.runtime.rows
    # Rows whose shares of heads are equal go through them in one call.
    groups: dict[tuple[tuple[float, str], ...], list[int]] = {}
    for i, row in enumerate(rows):
        if not row.prepared.generates and row.pool is None:
            expr = active[i if len(active) > 1 else 0]
            known = host.runtime.adapters
            shares = heads_of(expr, known, host.heads.names())
            if len(shares) > 1:  # a router's members may have heads for other labels than the one it answers with
                shares = [(w, n) for w, n in shares if known[n].labels == row.prepared.target.labels]
            groups.setdefault(tuple(shares), []).append(i)
    # A causal model answers at the end of a text, so only its last place is kept.
    for heads, members in groups.items():
        if not heads:
            raise HubError(f"{rows[members[0]].prepared.target.text} brings no head", hint="see `hub show`")
        at = torch.tensor(members, device=mask.device)
        seen, real = pick(output, at, last=last), mask[at][:, -1:] if last else mask[at]
        parts = [(w, host.heads.logits(host.runtime.adapters[n], seen, real)) for w, n in heads]
        for i, logits in zip(members, blend(parts), strict=True):
            if bool(logits.isnan().any()):
                rows[i].fail()
            else:
                rows[i].result = _classified(rows[i].prepared, logits)


def _classified(prepared: PreparedRow, logits: Tensor) -> Result:
    """Result of a classified row from its logits (classes,)."""
    target = prepared.target
    told: dict[str, Any] = {"weights": prepared.weights, "read": len(prepared.ids)}
    told |= {"adapter": target.text, "digest": target.digest}
    if target.task == "regress":
        return Result(value=float(logits[0]), **told)
    p, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    named = [(target.labels[i], float(q)) for q, i in zip(p.tolist(), order.tolist(), strict=True)]
    return Result(label=named[0][0], scores=tuple(named[: prepared.request.scores]), **told)
