"""The DEMix posterior over experts, as pure functions of tensors in log space.

With p_e(x_t | x_<t) the probability that expert e gave to token t, the weights for predicting token t are

    log pi_t(e) = log prior(e) + S_t(e) / temperature - log Z_t
    S_t(e)      = sum_{i<t} gamma^(t-1-i) log p_e(x_i | x_<i)

and the mixture is p(x_t | x_<t) = sum_e pi_t(e) p_e(x_t | x_<t) (DEMix layers, arXiv 2108.05036; the discount gamma and
the temperature are ours). gamma = 1 is Bayes' rule over the whole prefix; gamma = 0 looks at one previous token only,
as the code released with the paper does; between them old evidence fades, so the weights can follow a stream whose
domain changes. An infinite temperature ignores the evidence: fixed weights.

At gamma = 1 and temperature 1 the mixture telescopes to p(x) = sum_e prior(e) p_e(x), hence for every text and expert

    NLL(mixture) <= NLL(e) + ln(1 / prior(e))

Shapes: T predictions, E experts, any leading dimensions. Everything is float64 and nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hub.errors import UsageError


def log_prior(prior: Sequence[float] | Tensor | None, experts: int) -> Tensor:
    """Log prior (E,) in float64; None is uniform. A prior of zero rules an expert out for good.

    Raises
    ------
    UsageError
        Not one non-negative number for each expert, or they do not sum to one.
    """
    if experts < 1:
        raise UsageError("an ensemble needs at least one expert", hint="give the names of attached adapters")
    if prior is None:
        return torch.full((experts,), -math.log(experts), dtype=torch.float64)
    values = torch.as_tensor(prior, dtype=torch.float64).detach().cpu()
    if values.shape != (experts,):
        raise UsageError(f"the prior has shape {tuple(values.shape)} for {experts} experts", hint="one number each")
    total = float(values.sum())
    if not bool((values >= 0).all()) or not math.isclose(total, 1.0, rel_tol=0, abs_tol=1e-6):
        raise UsageError(
            f"the prior {values.tolist()} is not a distribution: it sums to {total:g}", hint="divide by it"
        )
    return (values / total).log()


def evidence(
    log_probs: Tensor, valid: Tensor | None = None, *, gamma: float = 1.0, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Discounted log likelihood of the tokens before each one, `S_{t+1} = gamma S_t + log p_e(x_t)`.

    Parameters
    ----------
    log_probs
        (..., T, E): log p_e of each token.
    valid
        (..., T): False for positions that are no predictions (padding); they neither add nor discount.
    start
        (..., E): evidence from earlier text; none is 0.

    Returns
    -------
    S before each token (..., T, E), and after the last one (..., E), which is the next call's `start`.
    """
    if not 0.0 <= gamma <= 1.0:
        raise UsageError(f"gamma is {gamma}, not in [0, 1]", hint="1 remembers everything, 0 one token")
    values = log_probs.to(torch.float64)
    counted = torch.ones(values.shape[:-1], dtype=torch.bool) if valid is None else valid
    counted = counted.to(values.device).unsqueeze(-1)
    state = values.new_zeros(*values.shape[:-2], values.shape[-1]) if start is None else start.to(values)
    if gamma == 1.0:
        after = state.unsqueeze(-2) + torch.where(counted, values, 0.0).cumsum(-2)
        before = torch.cat([state.unsqueeze(-2), after[..., :-1, :]], -2)
        return before, (after[..., -1, :] if values.shape[-2] else state)
    steps = []
    for value, count in zip(values.unbind(-2), counted.unbind(-2), strict=True):
        steps.append(state)
        # at gamma 0 the past is dropped, not multiplied: 0 * -inf would be NaN
        state = torch.where(count, value if gamma == 0.0 else gamma * state + value, state)
    return (torch.stack(steps, -2) if steps else torch.zeros_like(values)), state


def log_weights(evidence: Tensor, log_prior: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Normalized `log pi` (..., E) from evidence (..., E) and a log prior that broadcasts to it.

    Raises
    ------
    UsageError
        A temperature that is not positive, or text that every expert with any prior calls impossible.
    """
    if not temperature > 0.0:
        raise UsageError(f"the temperature is {temperature}, not above 0", hint="1 is Bayes, inf keeps the prior")
    prior = log_prior.to(evidence)
    scaled = torch.zeros_like(evidence) if math.isinf(temperature) else evidence / temperature
    weights = torch.where(prior.isneginf(), prior, prior + scaled).log_softmax(-1)
    if bool(weights.isnan().any()):
        raise UsageError("no expert with a prior gives the text a probability", hint="give every expert some prior")
    return weights


def mixture(log_weights: Tensor, log_probs: Tensor) -> Tensor:
    """Log of the mixture, `log sum_e exp(log pi + log p_e)`: (..., E) and (..., E) to (...)."""
    return torch.logsumexp(log_weights + log_probs.to(log_weights), -1)


def fitted(log_probs: Tensor, *, rounds: int = 100) -> Tensor:
    """Log of the fixed weights (E,) under which the tokens (N, E) are most likely, by EM from uniform.

    One token is added to each expert's share, so that none is ruled out: with few tokens the weights stay near uniform.
    """
    values, experts = log_probs.double(), log_probs.shape[-1]
    prior = log_prior(None, experts).to(values)
    for _ in range(rounds):
        share = (prior + values).softmax(-1).sum(0)
        prior = ((share + 1) / (len(values) + experts)).log()
    return prior


def moving_average(log_prior: Tensor, posterior: Tensor, *, rate: float = 0.3) -> Tensor:
    """Log of the next prior, `(1 - rate) prior + rate posterior`: DEMix's updating prior (rate 0.3); (E,) and (E,)."""
    return torch.log((1 - rate) * log_prior.exp() + rate * posterior.to(log_prior))
