"""How heads that were fitted apart are mixed: each is cooled or heated, some get the labels' words, all are weighed.

With z (N, C) a head's logits of held-out rows and w (N, C) what the labels' words say, the head counts as

    a z + s w,    a, s = argmin sum_i CE(a z_i + s w_i, y_i) + ((log a/a_0)^2 + (log s/s_0)^2) / (2 v^2)

and with the share exp(b - loss), normalized; v bounds how far few rows can move the scales, b is believed beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Weighing", "Weights", "cooled"]

_FREE, _TIGHT = 0.5, 0.3  # v of heads alone, and of heads with words: those have two scales to fit
_ALONE = -1.0  # b of heads that leave words unread which are there
_SURE = 0.75  # a_0 of heads with words: their logits get this standard deviation


@dataclass(frozen=True)
class Weights:
    """Of each head: its scale a, its words' strength s, its share."""

    scale: Tensor  # (H,)
    strength: Tensor
    share: Tensor


@dataclass(frozen=True)
class Weighing:
    """Held-out logits of heads, and where their scales start."""

    z: Tensor  # (H, N, C)
    words: Tensor  # (N, C)
    scale: Tensor  # (H,) a_0
    strength: Tensor  # (H,) s_0; 0 where no words are added
    width: Tensor  # (H,) v
    belief: Tensor  # (H,) b

    @classmethod
    def of(cls, alone: Tensor, on_words: Tensor | None, words: Tensor) -> Weighing:
        """Heads without words, those fitted on top of words, if there are words, and the first with words added."""
        count = len(alone)
        one = torch.ones(count)
        if on_words is None:
            return cls(alone, words, one, 0 * one, _FREE * one, 0 * one)
        spread = (alone - alone.mean(2, keepdim=True)).square().mean((1, 2)).sqrt().clamp(min=1e-6)
        return cls(
            torch.cat([alone, on_words, alone]),
            words,
            torch.cat([one, one, _SURE / spread]),
            torch.cat([0 * one, 0 * one, one]),
            torch.cat([_FREE * one, _FREE * one, _TIGHT * one]),
            torch.cat([_ALONE * one, 0 * one, 0 * one]),
        )

    def fit(self, labels: Tensor, rows: Tensor) -> Weights:
        """The weights that some rows give; their loss is scaled to all."""
        z, words, answers = self.z[:, rows], self.words[rows], labels[rows].expand(len(self.z), -1)
        free = torch.zeros(2, len(z), requires_grad=True)
        optimizer = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

        def losses() -> Tensor:
            a, s = self.scale * free[0].exp(), self.strength * free[1].exp()
            logits = a[:, None, None] * z + s[:, None, None] * words
            return F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view(len(z), -1).sum(1)

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = losses().sum() + (free / self.width).square().sum() / 2
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(objective)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            share = (self.belief - losses() * len(labels) / len(rows)).softmax(0)
            return Weights(self.scale * free[0].exp(), self.strength * free[1].exp(), share)

    def logits(self, weights: Weights, rows: Tensor) -> Tensor:
        """(n, C) the mixture's logits of some rows."""
        mixed = torch.einsum("h,hnc->nc", weights.share * weights.scale, self.z[:, rows])
        return mixed + float(weights.share @ weights.strength) * self.words[rows]


def cooled(logits: Tensor, labels: Tensor) -> float:
    """The factor a that makes logits (N, C) of held-out rows as sure as they are right; see above."""
    weighing = Weighing.of(logits[None], None, torch.zeros_like(logits))
    return float(weighing.fit(labels, torch.arange(len(labels))).scale)
