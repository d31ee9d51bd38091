"""Rows answered by an ensemble: the experts' output probabilities mixed, each row by its own posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compose.expr.tree import Call, Expr
from compose.function import bind
from hub.errors import UsageError
from router.engine.host import Host
from router.engine.request import Request
from router.ensemble.demix import Ensemble


@dataclass(frozen=True, eq=False)
class Mixture:
    """An ``ensemble.demix`` or ``ensemble.mean`` over residents; its rows are computed by themselves.

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

    @staticmethod
    def check(request: Request) -> None:
        """Refuse what an ensemble does not do."""
        if request.temperature > 0 or request.scores:
            raise UsageError("an ensemble decodes greedily and gives no scores", hint="temperature 0, scores 0")

    def generate(
        self, host: Host, ids: Tensor, mask: Tensor, room: int
    ) -> tuple[list[list[int]], list[dict[str, float]]]:
        """Tokens after the prompts (B, T), padded on the left, and each expert's weight when the row had been read."""
        host.forget()
        ensemble = Ensemble(host.model, self.experts, **self.options)
        generated = ensemble.generate(ids, mask, max_new_tokens=room, do_sample=False)
        first = generated.posterior[:, 0].tolist()
        weights = [{str(e): w for e, w in zip(self.experts, row, strict=True)} for row in first]
        return generated.sequences[:, ids.shape[1] :].tolist(), weights


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
