"""Rows answered by an ensemble: the experts' output probabilities mixed, each row by its own posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compose.expr.tree import Call, Expr
from compose.function import bind
from hub.errors import UsageError
from router.engine.host import Host
from router.ensemble import posterior as bayes
from router.ensemble.belief import Belief, belief


@dataclass(frozen=True, eq=False)
class Mixture:
    """An ``ensemble.demix`` or ``ensemble.mean`` over residents; each expert of a row is a lane of its batch.

    Attributes
    ----------
    experts
        Over the names of residents.
    options
        Of `router.ensemble.demix.Ensemble`.
    """

    experts: tuple[Expr, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, call: Call) -> Mixture:
        """The mixture that a call stands for.

        Raises
        ------
        UsageError
            A prior that depends on the rows before: here a row's answer depends on that row alone.
        """
        options: Any = bind(call)
        if call.function == "ensemble.mean":
            return cls(call.args, {"temperature": math.inf})  # the posterior stays what the uniform prior is
        if options.prior in ("updating", "cached", "fitted"):
            raise UsageError(
                f"the prior {options.prior!r} depends on the rows before, and rows are answered in any order",
                hint='prior="uniform", or one probability per expert',
            )
        prior = options.prior if isinstance(options.prior, str) else list(options.prior)
        how = {"gamma": options.gamma, "temperature": options.temperature, "hedge": options.hedge}
        return cls(call.args, {"prior": prior, **how})

    def begin(self, device: torch.device) -> RunningMixture:
        """What is believed of one row before its first token."""
        options = {name: value for name, value in self.options.items() if name != "prior"}
        prior = self.options.get("prior", "uniform")
        log_prior = bayes.log_prior(None if isinstance(prior, str) else prior, len(self.experts))
        return RunningMixture(belief(log_prior.to(device), 1, **options))

    def named(self, weights: Tensor) -> dict[str, float]:
        """Weights (E,) by the experts' names."""
        return {str(expert): w for expert, w in zip(self.experts, weights.tolist(), strict=True)}


class RunningMixture:
    """The weights of one row's experts, which move with every token."""

    def __init__(self, start: Belief) -> None:
        self.belief = start
        self._log_probs: Tensor | None = None  # (E, V) of the next token

    @property
    def weights(self) -> Tensor:
        """Of the next token (E,)."""
        return self.belief.log_weights[0].exp()

    def hear(self, log_probs: Tensor) -> None:
        """Learn from what the experts said of tokens that came, (T, E)."""
        if len(log_probs):
            heard = torch.ones(1, len(log_probs), dtype=torch.bool, device=log_probs.device)
            _, self.belief = self.belief.read(log_probs[None], heard)

    def mix(self, logits: Tensor) -> Tensor:
        """Log of the mixture's probabilities (V,) from the experts' logits (E, V)."""
        self._log_probs = logits.float().log_softmax(-1)
        return torch.logsumexp(self.belief.log_weights[0][:, None] + self._log_probs.double(), 0)

    def take(self, token: int) -> None:
        """Learn from the token that was chosen."""
        assert self._log_probs is not None  # noqa: S101 - it was chosen from them
        self.hear(self._log_probs[:, token][None])


def refuse_mixture(host: Host, text: str, task: str) -> None:
    """An ensemble continues texts. Raises UsageError for members or a base that do not."""
    if task != "generate":
        raise UsageError(f"{text} mixes the next token's probabilities, and its members classify", ref=text)
    if host.translates:
        raise UsageError(
            f"{text} mixes what causal language models say next, and {host.name} is an encoder-decoder",
            ref=text,
            hint="merge its members (ties(a, b)), or `hub route fit` a router of them",
        )
