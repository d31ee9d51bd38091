"""Heads for outputs that do not exclude each other: several labels a text, or a number.

With x the views' unit vectors side by side, times 4 and centred, every output c has a ridge of its own,

    labels:   sum_i [log(1 + exp f_c(x_i)) - y_ic f_c(x_i)] + lambda/2 |w_c|^2        f_c(x) = w_c^T x + b_c
    numbers:  1/2 sum_i (f(x_i) - (y_i - m) / s)^2 + lambda/2 |w|^2                   m, s: mean and sd of y

and the heads of all lambda are averaged by how likely each makes the answers of held-out folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from train.fewshot.reading.head import PENALTIES, SCALE, Head
from train.fewshot.reading.views import Features

_Solve: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
_Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

__all__ = ["IndependentHeads", "fit_labels", "fit_number", "thresholds"]


@dataclass(frozen=True)
class IndependentHeads:
    """A head, and what heads that learned nothing from a row say of it: `held` (N, C), as the head says it."""

    head: Head
    held: Tensor


@dataclass(frozen=True)
class _Rows:
    """Views side by side in an orthonormal basis of the rows, in which every fold and penalty is fitted."""

    z: Tensor  # (N, r)
    basis: Tensor  # (D, r)
    mean: Tensor  # (D,)
    widths: tuple[int, ...]

    @classmethod
    def of(cls, features: Features) -> _Rows:
        x = torch.cat(features.states, 1) * SCALE
        mean = x.mean(0)
        rows, width = x.shape
        basis = torch.linalg.qr((x - mean).T)[0] if rows < width else torch.eye(width)
        return cls((x - mean) @ basis, basis, mean, tuple(state.shape[1] for state in features.states))

    def head(self, weight: Tensor, offset: Tensor) -> Head:
        """For unit vectors that are not centred, from (r, C) and (C,)."""
        full = self.basis @ weight
        return Head(torch.split(full * SCALE, list(self.widths)), offset - self.mean @ full, 0.0)


def fit_labels(features: Features, answers: Tensor, parts: Sequence[Sequence[int]]) -> IndependentHeads:
    """Logits (N, C) of labels that a text has or not; answers (N, C) of 0 and 1."""

    def solve(z: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        weight = torch.zeros(z.shape[1], y.shape[1], requires_grad=True)
        offset = torch.zeros(y.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, offset], max_iter=60, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            # A label that every row has, or none, would push its offset to infinity: half a row is added to each side.
            logits = torch.cat([z @ weight + offset, offset[None], offset[None]])
            target = torch.cat([y, torch.ones_like(y[:1]), torch.zeros_like(y[:1])])
            share = torch.tensor([1.0] * len(y) + [0.5, 0.5])[:, None]
            loss = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * share).sum()
            loss = loss + penalty / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(objective)  # type: ignore[no-untyped-call]
        return weight.detach(), offset.detach()

    def loss(held: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(held, y, reduction="sum") / y.shape[1]

    return _averaged(_Rows.of(features), answers.float(), parts, solve, loss)


def fit_number(features: Features, answers: Tensor, parts: Sequence[Sequence[int]]) -> IndependentHeads:
    """Numbers (N, 1); answers (N,)."""
    middle, spread = answers.mean(), answers.std().clamp_min(1e-12)

    def solve(z: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        offset = y.mean(0)
        system = z.T @ z + penalty * torch.eye(z.shape[1])
        return torch.linalg.solve(system, z.T @ (y - offset)), offset

    def loss(held: Tensor, y: Tensor) -> Tensor:
        return len(y) / 2 * (held - y).square().mean().log()  # of a Gaussian whose variance is the error's

    standard = ((answers - middle) / spread)[:, None].float()
    found = _averaged(_Rows.of(features), standard, parts, solve, loss)
    weights = tuple(weight * spread for weight in found.head.weights)
    return IndependentHeads(Head(weights, found.head.offset * spread + middle, 0.0), found.held * spread + middle)


def _averaged(rows: _Rows, y: Tensor, parts: Sequence[Sequence[int]], solve: _Solve, loss: _Loss) -> IndependentHeads:
    every = torch.arange(len(y))
    held = torch.zeros(len(PENALTIES), *y.shape)
    for part in parts:
        out = torch.tensor(part)
        rest = every[~torch.isin(every, out)]
        for own, penalty in zip(held, PENALTIES, strict=True):
            weight, offset = solve(rows.z[rest], y[rest], penalty)
            own[out] = rows.z[out] @ weight + offset
    shares = torch.softmax(-torch.stack([loss(own, y) for own in held]), 0)
    weight, offset = (
        sum(share * part for share, part in zip(shares, found, strict=True))
        for found in zip(*(solve(rows.z, y, penalty) for penalty in PENALTIES), strict=True)
    )
    head = rows.head(torch.as_tensor(weight), torch.as_tensor(offset))
    return IndependentHeads(head, torch.einsum("p,pnc->nc", shares, held))


def thresholds(probabilities: Tensor, answers: Tensor) -> tuple[float, ...]:
    """For each label the probability from which a text has it: where F1 of held-out rows is highest, nearest to 1/2.

    Both (N, C). F1 counts half a right answer and half a wrong one beside the rows, so that few rows move it little.
    """
    found = []
    for p, y in zip(probabilities.T, answers.T.bool(), strict=True):
        order = p.unique()
        cuts = [0.5, *((order[1:] + order[:-1]) / 2).tolist()]
        scored = []
        for cut in cuts:
            said = p >= cut
            f1 = (2 * float((said & y).sum()) + 1) / (float(said.sum() + y.sum()) + 2)
            scored.append((round(f1, 9), -abs(cut - 0.5), cut))
        found.append(round(max(scored)[2], 6))
    return tuple(found)
