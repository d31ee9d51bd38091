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

from train.fewshot.views import Features

__all__ = ["Head", "average", "choose_head", "fit_head", "words_alone"]

PENALTIES = (0.25, 1.0, 4.0, 16.0, 64.0)  # lambda
SCALE = 4.0  # c: unit vectors made long enough for penalties near one


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


def fit_head(
    features: Features, labels: Tensor, classes: int, penalty: float, *, prior: bool = True, steps: int = 60
) -> Head:
    """Minimize the convex objective by L-BFGS; labels (N,) of classes, or (N, C) of probabilities."""
    x = torch.cat(features.states, 1) * SCALE
    mean = x.mean(0)
    x = x - mean
    speaks = prior and features.prior.shape[1] > 0
    words = features.prior.mean(1) if speaks else x.new_zeros(len(x), classes)
    middle = words.mean(0)
    words = words - middle
    # With fewer rows than features the solution lies in the rows' span: solve there (exact for a ridge penalty).
    basis = torch.linalg.qr(x.T)[0] if x.shape[0] < x.shape[1] else torch.eye(x.shape[1])
    z = x @ basis
    weight = torch.zeros(z.shape[1], classes, requires_grad=True)
    offset = torch.zeros(classes, requires_grad=True)
    strength = torch.full((1,), float(speaks), requires_grad=speaks)
    free = [weight, offset, strength] if speaks else [weight, offset]
    optimizer = torch.optim.LBFGS(free, max_iter=steps, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = z @ weight + offset + strength * words
        bound = penalty * weight.square().sum() + 3 * (strength - 1).square().sum() * float(speaks)
        loss = F.cross_entropy(logits, labels, reduction="sum") + bound / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    full = basis @ weight.detach()
    s = float(strength.detach()) if speaks else 0.0
    widths = [state.shape[1] for state in features.states]
    return Head((full * SCALE).split(widths), offset.detach() - mean @ full - s * middle, s)


def choose_head(
    features: Features, labels: Tensor, classes: int, parts: Sequence[Sequence[int]], *, prior: bool = True
) -> tuple[Head, float]:
    """The heads of all penalties, averaged by how well each predicts held-out folds of these same rows.

    A head's share is exp(-loss), normalized, its loss in nats over all rows: with few rows no penalty is clearly the
    best, and the mean of several is steadier than one. Returns the head and the shares' held-out accuracy.
    """
    losses, hits = [], []
    repeats = max(1, round(sum(len(p) for p in parts) / len(labels)))
    for penalty in PENALTIES:
        loss = right = 0.0
        for part in parts:
            held = set(part)
            rest = [i for i in range(len(labels)) if i not in held]
            logits = fit_head(features.select(rest), labels[rest], classes, penalty, prior=prior)(features.select(part))
            loss += float(F.cross_entropy(logits, labels[list(part)], reduction="sum"))
            right += float((logits.argmax(1) == labels[list(part)]).sum())
        losses.append(loss / repeats)
        hits.append(right / repeats / len(labels))
    shares = torch.softmax(-torch.tensor(losses), 0).tolist()
    heads = [fit_head(features, labels, classes, penalty, prior=prior) for penalty in PENALTIES]
    return average(heads, shares), sum(s * h for s, h in zip(shares, hits, strict=True))
