"""How an ensemble's weights move as texts are read: by Bayes' rule, or hedged between slower and faster ways to move.

A belief holds for B texts what E experts' weights will be for the next token, and makes the belief after it. Everything
is float64 and in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from hub.errors import UsageError
from router.ensemble import posterior as bayes

RATES: Final = (1.0, 0.3, 0.1, 0.03, 0.0)  # of a hedged belief, from Bayes' rule to weights that stand still


class Belief(ABC):
    """Weights of the experts for the next token of each text."""

    @property
    @abstractmethod
    def log_weights(self) -> Tensor:
        """`log pi` (B, E), normalized."""

    @abstractmethod
    def read(self, log_probs: Tensor, heard: Tensor) -> tuple[Tensor, Belief]:
        """`log pi` before each of T tokens (B, T, E), and the belief after them.

        `log_probs` (B, T, E) are the experts' of those tokens; where `heard` (B, T) is False, nothing is learned.
        """

    @abstractmethod
    def without(self, light: Tensor) -> Belief:
        """The belief with the experts where `light` (B, E) ruled out for good; the others share their weight."""


@dataclass(frozen=True)
class Posterior(Belief):
    """The posterior of DEMix, discounted and tempered; see `router.ensemble.posterior`.

    Attributes
    ----------
    log_prior, evidence : (B, E).
    """

    log_prior: Tensor
    evidence: Tensor
    gamma: float
    temperature: float

    @property
    def log_weights(self) -> Tensor:
        """Bayes' rule (B, E)."""
        return bayes.log_weights(self.evidence, self.log_prior, temperature=self.temperature)

    def read(self, log_probs: Tensor, heard: Tensor) -> tuple[Tensor, Belief]:
        """All tokens at once."""
        before, after = bayes.evidence(log_probs, heard, gamma=self.gamma, start=self.evidence)
        weights = bayes.log_weights(before, self.log_prior[:, None], temperature=self.temperature)
        return weights, replace(self, evidence=after)

    def without(self, light: Tensor) -> Belief:
        """Their prior becomes zero."""
        return replace(self, log_prior=self.log_prior.masked_fill(light, -torch.inf))


@dataclass(frozen=True)
class Hedged(Belief):
    """Weights that move at each of several rates, mixed by how well each rate has predicted.

    At the rate eta, `v_{t+1}(e) = (1 - eta) v_t(e) + eta v_t(e) p_e(x_t) / m_t`, `m_t = sum_e v_t(e) p_e(x_t)`
    (Soft-Bayes, arXiv 1901.02230): 1 is Bayes' rule, 0 keeps the prior, and between them the weights seek the best
    fixed mixture instead of the best single expert. A rate is trusted by Bayes' rule over the m_t, beginning alike.
    So with K rates, for every text, `NLL <= NLL(any rate) + ln K`, also of the prior's own mixture and the posterior.

    Attributes
    ----------
    log_joint : (B, K, E), log of the trust in a rate times the expert's weight under it; sums to one over both.
    rates : (K,).
    """

    log_joint: Tensor
    rates: tuple[float, ...]

    @property
    def log_weights(self) -> Tensor:
        """Summed over the rates (B, E)."""
        return self.log_joint.logsumexp(1)

    def read(self, log_probs: Tensor, heard: Tensor) -> tuple[Tensor, Belief]:
        """One token after the other."""
        belief, weights = self, []
        for values, counts in zip(log_probs.double().unbind(1), heard.unbind(1), strict=True):
            weights.append(belief.log_weights)
            belief = replace(self, log_joint=belief._after(values, counts))
        shape = (*log_probs.shape[:2], self.log_joint.shape[-1])
        return (torch.stack(weights, 1) if weights else self.log_joint.new_zeros(shape)), belief

    def _after(self, log_probs: Tensor, heard: Tensor) -> Tensor:
        """The joint after a token: `J (1 - eta) m + J eta p`, normalized, with m each rate's own probability of it."""
        p = log_probs[:, None]  # (B, 1, E)
        total = self.log_joint.logsumexp(-1, keepdim=True)  # (B, K, 1)
        m = torch.where(total.isneginf(), total, (self.log_joint + p).logsumexp(-1, keepdim=True) - total)
        eta = torch.tensor(self.rates, dtype=p.dtype, device=p.device)[:, None]  # (K, 1)
        moved = self.log_joint + torch.logaddexp((1 - eta).log() + m, eta.log() + p)
        moved = moved.flatten(1).log_softmax(-1).view_as(moved)
        if bool(moved.isnan().any()):
            raise UsageError("no expert with a prior gives the text a probability", hint="give every expert some prior")
        return torch.where(heard[:, None, None], moved, self.log_joint)

    def without(self, light: Tensor) -> Belief:
        """Their share under every rate becomes zero."""
        left = self.log_joint.masked_fill(light[:, None], -torch.inf)
        return replace(self, log_joint=left.flatten(1).log_softmax(-1).view_as(left))


def belief(
    log_prior: Tensor,
    texts: int,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    hedge: bool = False,
    rates: tuple[float, ...] = RATES,
) -> Belief:
    """What is believed of so many texts before their first token, from a log prior (E,).

    Raises
    ------
    UsageError
        A gamma or temperature out of range, or other than 1 where the belief is hedged.
    """
    prior = log_prior.double().expand(texts, -1)
    started = Posterior(prior, torch.zeros_like(prior), gamma, temperature)
    if not hedge:
        bayes.evidence(prior[:, None], gamma=gamma)  # what is wrong with them is told here, not at the first text
        bayes.log_weights(started.evidence, prior, temperature=temperature)
        return started
    if (gamma, temperature) != (1.0, 1.0):
        raise UsageError(
            f"hedged weights choose their own pace, and gamma {gamma:g}, temperature {temperature:g} set one",
            hint="leave gamma and temperature at 1, or hedge=False",
        )
    return Hedged((prior[:, None] - math.log(len(rates))).expand(-1, len(rates), -1), rates)
