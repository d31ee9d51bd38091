"""``lorahub(a, b, ..., weights=[...])``: a sum of LoRAs with weights searched on a few examples (arXiv:2307.13269).

The search needs data and a score, so it is a Python function, :func:`search`; it returns this call with the weights it
found, which is then an expression like any other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compose.errors import KindError
from compose.expr.tree import Call, Expr, Ref
from compose.parameter_space.method import factored
from compose.parameter_space.options import RankOptions, check_weights, in_any_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compose.kernels.low_rank import Pair

_CANDIDATE = "lorahub candidate"


class LorahubOptions(RankOptions):
    """Options of ``lorahub``."""

    variant: Literal["paper", "exact"] = Field(
        "paper", description="paper: A = sum w A_i and B = sum w B_i, with cross terms; exact: sum w B_i A_i"
    )


@factored(
    "lorahub",
    "Sum of LoRAs with weights that were searched, without gradients, on a few examples.",
    paper="arXiv:2307.13269",
    options=LorahubOptions,
    check=check_weights,
    canonical=in_any_order,
    otherwise=lambda _: "cat",
)
def lorahub(pairs: Sequence[Pair], o: LorahubOptions) -> Pair:
    """`(sum_i w_i B_i) (sum_i w_i A_i)` with ``variant="paper"``, whose cross terms `B_i A_j` are part of the method.

    ``exact`` is `sum_i w_i B_i A_i`. The paper's form needs one rank; a scale s is shared out as `sqrt(s)` to each
    factor.
    """
    import torch

    from compose.kernels import factors
    from compose.kernels.low_rank import Pair

    if o.weights is None:
        raise KindError(
            "lorahub has no weights yet: they are searched on examples",
            hint="compose.merges.lorahub.search(model, names, score) returns lorahub(..., weights=[...])",
        )
    if o.variant == "exact":
        return factors.stack(pairs, o.weights)
    if len({p.rank for p in pairs}) > 1:
        ranks = sorted({p.rank for p in pairs})
        raise KindError(f"lorahub adds A to A and B to B, and these have ranks {ranks}", hint='variant="exact"')
    shares = [w * math.sqrt(p.scale) for w, p in zip(o.weights, pairs, strict=True)]
    a = torch.stack([share * p.A.float() for share, p in zip(shares, pairs, strict=True)]).sum(0)
    b = torch.stack([share * p.B.float() for share, p in zip(shares, pairs, strict=True)]).sum(0)
    return Pair(a, b, 1.0)


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the expression with its weights, its score, and the best score after each evaluation."""

    expr: Expr
    weights: tuple[float, ...]
    score: float
    history: tuple[float, ...]


def search(
    model: PreTrainedModel,
    names: Sequence[str],
    score: Callable[[PreTrainedModel], float],
    *,
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    variant: str = "paper",
    seed: int = 0,
) -> SearchResult:
    """Search weights in [-bound, bound]^n that minimize ``score(model)`` + penalty * mean |w|, by CMA-ES.

    Parameters
    ----------
    names
        Resident low-rank adapters.
    score
        Called with the candidate active; returns a loss, e.g. the mean over a few examples. Lower is better.
    budget
        Number of evaluations; the first one is w = 0, the bare base.
    variant
        See :func:`lorahub`.
    seed
        Of the search; the same seed, adapters and score give the same weights.

    Returns
    -------
    The best candidate, left inactive: ``compose.activate(model, found.expr)`` applies it. What was active stays so.

    Raises
    ------
    KindError
        Adapters that cannot be summed, a score that is not finite, or the package ``cma`` is missing.
    """
    try:
        import cma
    except ImportError:
        raise KindError(
            "the search for lorahub's weights runs on cma, which is not installed",
            hint='pip install "moduloom[search]"',
        ) from None
    bench = _Bench(model, names, score, penalty, variant)
    options = {"bounds": [-bound, bound], "seed": seed + 1, "verbose": -9}  # 0 would mean the clock
    strategy = cma.CMAEvolutionStrategy([0.0] * len(names), bound / 3, options)
    with bench.home.as_it_was():
        bench.evaluate([0.0] * len(names))
        while len(bench.seen) < budget and not strategy.stop():
            candidates = strategy.ask()[: budget - len(bench.seen)]
            losses = [bench.evaluate(w) for w in candidates]
            if len(candidates) == strategy.popsize:
                strategy.tell(candidates, losses)
    loss, weights = min(bench.seen)
    history = tuple(itertools.accumulate((value for value, _ in bench.seen), min))
    return SearchResult(_call(names, weights, variant), weights, loss, history)


class _Bench:
    """Tries weights one after the other on a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        score: Callable[[PreTrainedModel], float],
        penalty: float,
        variant: str,
    ) -> None:
        from compose.runtime.model_runtime import runtime

        self.model, self.names, self.score, self.penalty, self.variant = model, names, score, penalty, variant
        self.home = runtime(model)
        self.seen: list[tuple[float, tuple[float, ...]]] = []

    def evaluate(self, w: Sequence[float]) -> float:
        """Score of one candidate, with the penalty; KindError if it is not finite."""
        weights = tuple(round(float(x), 6) for x in w)
        from compose.merging.merge import merge

        merged = merge(self.model, _call(self.names, weights, self.variant))
        self.home.add(_CANDIDATE, merged.adapter)
        self.home.activate([Ref(_CANDIDATE)], {})
        loss = float(self.score(self.model))
        if not math.isfinite(loss):
            raise KindError(f"the score of weights {list(weights)} is {loss}", hint="a score is a finite loss")
        self.seen.append((loss + self.penalty * sum(map(abs, weights)) / len(weights), weights))
        return self.seen[-1][0]


def _call(names: Sequence[str], weights: Sequence[float], variant: str) -> Call:
    options: dict[str, object] = {"weights": list(weights)}
    if variant != "paper":
        options["variant"] = variant
    return Call("lorahub", [Ref(name) for name in names], options)
