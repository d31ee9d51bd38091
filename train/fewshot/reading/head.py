"""A linear head on several views that starts from what the label words already say.

    logits(x) = sum_v W_v^T (c h_v(x) - mu_v) + b + s mean_t (z_t(x) - m_t)

h_v are the views' unit vectors, c = 4, mu_v their means over the training rows; z_t are the label words' logits at
template t's mask and m_t their means (calibration without labels). The fit is convex:

    sum_i CE(logits(x_i), y_i) + lambda / 2 sum_v |W_v|^2 + 3/2 (s - 1)^2,     s = 0 fixed without the prior

so with little data the head stays near the words' own answer, and with more it leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.fewshot.reading.views import Features
from train.fewshot.reading.weighing import Weighing

__all__ = ["Head", "HeadChoice", "average", "choose_head", "fit_head", "words_alone"]

PENALTIES = (1.0, 4.0, 16.0, 64.0, 256.0)  # lambda; the last two are nearly the direction of the classes' means
SCALE = 4.0  # c: unit vectors made long enough for penalties near one
STEPS = 60  # of L-BFGS, a penalty: more than it takes with few rows
_MOST = 512  # dimensions of a fit


@dataclass(frozen=True)
class Head:
    """A linear head: one block of weights a view (absent views have zero rows), and the words' strength.

    Without weights and with strength one it is the label words' own answer.
    """

    weights: tuple[Tensor, ...]  # one (d, C) a view, for unit vectors
    offset: Tensor  # (C,) b - W^T mu - s m
    strength: float  # s

    def __call__(self, features: Features) -> Tensor:
        """(N, C) logits."""
        logits = self.offset.expand(len(features), -1)
        for weight, state in zip(self.weights, features.states, strict=False):
            if len(weight):
                logits = logits + state @ weight
        return logits + self.strength * features.prior.mean(1) if self.strength else logits


def words_alone(classes: int) -> Head:
    """The head that believes the label words."""
    return Head((), torch.zeros(classes), 1.0)


def average(heads: Sequence[Head], shares: Sequence[float]) -> Head:
    """The head whose logits are the weighted mean of these heads' logits."""
    pairs = list(zip(shares, heads, strict=True))
    weights = tuple(
        sum((s * h.weights[v] for s, h in pairs[1:]), pairs[0][0] * pairs[0][1].weights[v])
        for v in range(len(heads[0].weights))
    )
    offset = sum((s * h.offset for s, h in pairs[1:]), pairs[0][0] * pairs[0][1].offset)
    return Head(weights, offset, sum(s * h.strength for s, h in pairs))


@dataclass(frozen=True)
class _Space:
    """Rows of several views in one orthonormal basis, in which all penalties and folds are fitted.

    With fewer rows than features the solutions lie in the rows' span, so nothing is lost; beyond `_MOST` dimensions
    the leading ones are kept.
    """

    z: Tensor  # (N, r)
    words: Tensor  # (N, C) the labels' own answer, centred
    basis: Tensor  # (D, r)
    mean: Tensor  # (D,)
    middle: Tensor  # (C,)
    widths: tuple[int, ...]
    speaks: bool

    @classmethod
    def of(cls, features: Features, classes: int, prior: bool) -> _Space:
        """Centre and rotate."""
        x = torch.cat(features.states, 1) * SCALE
        mean = x.mean(0)
        x = x - mean
        speaks = prior and features.prior.shape[1] > 0
        words = features.prior.mean(1) if speaks else x.new_zeros(len(x), classes)
        middle = words.mean(0)
        basis = _basis(x)
        widths = tuple(state.shape[1] for state in features.states)
        return cls(x @ basis, words - middle, basis, mean, middle, widths, speaks)

    def head(self, solution: _Solution) -> Head:
        """The head of a solution, for uncentred unit vectors."""
        full = self.basis @ solution.weight
        offset = solution.offset - self.mean @ full - solution.strength * self.middle
        return Head(torch.split(full * SCALE, list(self.widths)), offset, solution.strength)


def _basis(x: Tensor) -> Tensor:
    """(D, r) orthonormal: the rows' span, or the leading `_MOST` directions of it by subspace iteration."""
    rows, width = x.shape
    if min(rows, width) <= _MOST:
        return torch.linalg.qr(x.T)[0] if rows < width else torch.eye(width)
    basis = torch.randn(width, _MOST, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        basis = torch.linalg.qr(x.T @ (x @ basis))[0]
    return basis


@dataclass(frozen=True)
class _Solution:
    weight: Tensor  # (r, C)
    offset: Tensor  # (C,)
    strength: float

    def logits(self, space: _Space, rows: Tensor) -> Tensor:
        """(n, C) of some rows."""
        return space.z[rows] @ self.weight + self.offset + self.strength * space.words[rows]


def _solve(
    space: _Space, rows: Tensor, labels: Tensor, penalty: float, start: _Solution | None = None, steps: int = STEPS
) -> _Solution:
    """Minimize the convex objective on some rows by L-BFGS; `labels` are those of these rows."""
    z, words, classes = space.z[rows], space.words[rows], space.words.shape[1]
    weight = (torch.zeros(z.shape[1], classes) if start is None else start.weight.clone()).requires_grad_()
    offset = (torch.zeros(classes) if start is None else start.offset.clone()).requires_grad_()
    speaks = float(space.speaks)
    strength = torch.full((1,), speaks if start is None else start.strength, requires_grad=space.speaks)
    free = [weight, offset, strength] if space.speaks else [weight, offset]
    optimizer = torch.optim.LBFGS(free, max_iter=steps, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = z @ weight + offset + strength * words
        bound = penalty * weight.square().sum() + 3 * (strength - 1).square().sum() * speaks
        loss = F.cross_entropy(logits, labels, reduction="sum") + bound / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return _Solution(weight.detach(), offset.detach(), float(strength.detach()) if space.speaks else 0.0)


def fit_head(features: Features, labels: Tensor, classes: int, penalty: float, *, prior: bool = True) -> Head:
    """Minimize the convex objective; labels (N,) of classes, or (N, C) of probabilities."""
    space = _Space.of(features, classes, prior)
    return space.head(_solve(space, torch.arange(len(labels)), labels, penalty))


@dataclass(frozen=True)
class HeadChoice:
    """A head, and what heads that learned nothing from a row say of it: `held` (N, C); `seen` (N,) where there are."""

    head: Head
    held: Tensor
    seen: Tensor

    def accuracy(self, labels: Tensor) -> float:
        """Cross-validated share of right answers."""
        return float((self.held.argmax(1) == labels)[self.seen].double().mean())


def choose_head(
    features: Features, labels: Tensor, classes: int, parts: Sequence[Sequence[int]], *, steps: int = STEPS
) -> HeadChoice:
    """The heads of all penalties, averaged by how well each predicts held-out folds of these same rows.

    Where the labels' own words speak there are three heads a penalty: one fitted without them, one on top of them, and
    the first with the words added. They are weighed by `weighing`: with few rows none is clearly the best, and the mean
    of several is steadier than one. `held` is nested: what weighs the heads for a fold is the other folds alone.
    """
    spaces = [_Space.of(features, classes, False)]
    if features.prior.shape[1]:
        spaces.append(_Space.of(features, classes, True))
    held, seen = _held(spaces, labels, classes, parts, steps)
    weighing = Weighing.of(held[0], held[1] if len(spaces) > 1 else None, spaces[-1].words)
    mixed, done = torch.zeros(len(labels), classes), torch.zeros_like(seen)
    for part in parts:
        out = torch.tensor([i for i in part if not done[i]], dtype=torch.long)
        if not len(out):  # a later round: each row is mixed once
            break
        done[out] = True
        others = seen & ~torch.isin(torch.arange(len(labels)), out)
        rest = (others if bool(others.any()) else seen).nonzero()[:, 0]
        mixed[out] = weighing.logits(weighing.fit(labels, rest), out)
    # What answers learns from all rows, and is mixed as all folds say.
    weights, every = weighing.fit(labels, seen.nonzero()[:, 0]), torch.arange(len(labels))
    paths = [[space.head(solution) for solution in _path(space, every, labels, steps)] for space in spaces]
    heads = [*paths[0], *paths[-1], *paths[0]] if len(spaces) > 1 else paths[0]
    spoken = Head(tuple(torch.zeros_like(w) for w in heads[0].weights), -spaces[-1].middle, 1.0)
    shares = [*(weights.share * weights.scale).tolist(), float(weights.share @ weights.strength)]
    return HeadChoice(average([*heads, spoken], shares), mixed, seen)


def _held(
    spaces: Sequence[_Space], labels: Tensor, classes: int, parts: Sequence[Sequence[int]], steps: int
) -> tuple[Tensor, Tensor]:
    """(S, P, N, C) what each penalty in each space predicts of folds from the others, the mean over the rounds.

    With which (N,) rows were in a fold.
    """
    every, counts = torch.arange(len(labels)), torch.zeros(len(labels))
    held = torch.zeros(len(spaces), len(PENALTIES), len(labels), classes)
    for part in parts:
        out = torch.tensor(part)
        rest = every[~torch.isin(every, out)]
        for own, space in zip(held, spaces, strict=True):
            for i, solution in enumerate(_path(space, rest, labels[rest], steps)):
                own[i, out] += solution.logits(space, out)
        counts[out] += 1
    return held / counts.clamp(min=1)[:, None], counts > 0


def _path(space: _Space, rows: Tensor, labels: Tensor, steps: int) -> list[_Solution]:
    """The solution of each penalty, in their order; each starts from that of the next stronger one."""
    solutions: list[_Solution] = []
    for penalty in reversed(PENALTIES):
        solutions.append(_solve(space, rows, labels, penalty, solutions[-1] if solutions else None, steps))
    return solutions[::-1]
