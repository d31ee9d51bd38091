"""``ensemble.demix(a, b, ...)`` and ``ensemble.mean(a, b, ...)``: mixtures of output probabilities.

p(x_t | x_<t) = sum_e pi_(t,e) p_e(x_t | x_<t). ``mean`` keeps pi uniform; ``demix`` makes it the Bayes posterior of the
experts given the tokens so far (DEMix, arXiv 2108.05036), or hedges it. The router carries them out.
"""

from __future__ import annotations

import math

from pydantic import Field

from compose.errors import CallError
from compose.expr.tree import Call
from compose.function import FunctionSpec, Options, register

_PRIORS = ("uniform", "updating", "cached", "fitted")


class DemixOptions(Options):
    """Options of ``ensemble.demix``."""

    prior: str | tuple[float, ...] = Field(
        "uniform", description='"uniform", "updating", "cached", "fitted", or one probability per expert'
    )
    gamma: float = Field(1.0, ge=0, le=1, description="forgetting: 1 is Bayes, 0 looks at the previous token only")
    temperature: float = Field(1.0, gt=0, description="divides the log posterior before it is normalized")
    hedge: bool = Field(False, description="mix slower and faster weights by how they predict; gamma, temperature 1")


def _check(call: Call, options: DemixOptions) -> None:
    if options.hedge and (options.gamma, options.temperature) != (1.0, 1.0):
        raise CallError("hedged weights choose their own pace: gamma and temperature stay 1", option="hedge")
    prior = options.prior
    if isinstance(prior, str):
        if prior not in _PRIORS:
            raise CallError(f"prior {prior!r} is none of {', '.join(_PRIORS)}", option="prior")
        return
    if len(prior) != len(call.args):
        raise CallError(f"{len(call.args)} experts and {len(prior)} prior probabilities", option="prior")
    if min(prior) < 0 or not math.isclose(math.fsum(prior), 1.0, abs_tol=1e-6):
        raise CallError(f"prior probabilities sum to {math.fsum(prior):g}, not 1", option="prior")


DEMIX = register(
    FunctionSpec(
        "ensemble.demix",
        "ensemble",
        "Mixture of the experts' output probabilities, weighted by their Bayes posterior.",
        DemixOptions,
        check=_check,
    )
)
MEAN = register(FunctionSpec("ensemble.mean", "ensemble", "Uniform mixture of the experts' output probabilities."))
