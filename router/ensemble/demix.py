"""DEMix: an ensemble of domain experts weighted by the posterior over domains (arXiv 2108.05036).

>>> ensemble = Ensemble(model, ["code", "law", "mail"])
>>> score = ensemble.score(input_ids)          # one forward pass for all experts
>>> score.posterior[0, -1]                     # which expert explains the text so far
>>> score.reweighed(temperature=math.inf)      # the uniform ensemble of the same forward pass
>>> score.reweighed(hedge=True)                # no worse than either, but for a nat or two a text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hub.errors import UsageError
from router.ensemble import posterior as bayes
from router.ensemble.belief import Belief, belief
from router.ensemble.experts import MAX_LOGITS, Member, expert_log_probs
from router.ensemble.generate import Generated, generate

Prior = str | Sequence[float] | Tensor
PRIORS = ("uniform", "updating", "cached", "fitted")
CACHED_SEQUENCES = 100


@dataclass(frozen=True)
class EnsembleScore:
    """What a forward pass of E experts says about B texts; all in nats.

    Attributes
    ----------
    expert_log_probs : (E, B, T-1) float32, log p_e(x_{t+1} | x_<=t); 0 where not valid.
    valid : (B, T-1) bool, positions that are predictions of a real token.
    posterior : (B, T-1, E) float64, the weights used for each prediction; each sums to one.
    final : (B, E) float64, the posterior after the whole text.
    log_probs : (B, T-1) float64, log of the mixture; 0 where not valid.
    prior : (E,) float64, the log prior.
    gamma, temperature, prefix, hedge : what the weights were computed with; see `Ensemble`.
    """

    expert_log_probs: Tensor
    valid: Tensor
    posterior: Tensor
    final: Tensor
    log_probs: Tensor
    prior: Tensor
    gamma: float
    temperature: float
    prefix: int | None = None
    hedge: bool = False

    @property
    def tokens(self) -> Tensor:
        """Predicted tokens of each text (B,)."""
        return self.valid.sum(1)

    @property
    def nll(self) -> Tensor:
        """Negative log likelihood of each text under the mixture (B,)."""
        return -self.log_probs.sum(1)

    @property
    def expert_nll(self) -> Tensor:
        """Negative log likelihood of each text under each expert (E, B), summed in float64."""
        return -self.expert_log_probs.double().sum(2)

    @property
    def regret(self) -> Tensor:
        """`NLL(mixture) - NLL(e) - ln(1 / prior(e))`, (E, B): at gamma 1, temperature 1 never above 0; hedged, ln 5."""
        return self.nll - self.expert_nll + self.prior.to(self.nll)[:, None]

    def reweighed(
        self,
        *,
        prior: Sequence[float] | Tensor | None = None,
        gamma: float | None = None,
        temperature: float | None = None,
        prefix: int | None = None,
        hedge: bool | None = None,
    ) -> EnsembleScore:
        """Score the same forward pass with another prior, discount, temperature, prefix or hedged; no model runs.

        An infinite temperature keeps the prior as fixed weights: with a uniform one, the uniform ensemble.
        """
        log_prior = self.prior if prior is None else bayes.log_prior(prior, len(self.prior))
        return mix(
            self.expert_log_probs,
            self.valid,
            log_prior=log_prior,
            gamma=self.gamma if gamma is None else gamma,
            temperature=self.temperature if temperature is None else temperature,
            prefix=self.prefix if prefix is None else prefix,
            hedge=self.hedge if hedge is None else hedge,
        )


def mix(
    expert_log_probs: Tensor,
    valid: Tensor,
    *,
    log_prior: Tensor,
    gamma: float = 1.0,
    temperature: float = 1.0,
    prefix: int | None = None,
    hedge: bool = False,
) -> EnsembleScore:
    """Posterior and mixture from expert log probabilities (E, B, T-1) and valid (B, T-1)."""
    values = expert_log_probs.permute(1, 2, 0).double()  # (B, T-1, E)
    heard = valid if prefix is None else valid & (valid.cumsum(1) <= prefix)
    start = belief(log_prior.to(values), len(values), gamma=gamma, temperature=temperature, hedge=hedge)
    weights, end = start.read(values, heard)
    mixed = bayes.mixture(weights, values).masked_fill(~valid, 0.0)
    final = end.log_weights.exp()
    how = (gamma, temperature, prefix, hedge)
    return EnsembleScore(expert_log_probs, valid, weights.exp(), final, mixed, log_prior, *how)


class Ensemble:
    """Experts of one model, mixed in probability space by their posterior.

    Parameters
    ----------
    model
        A causal language model with the experts attached (`compose.load`, `compose.attach`).
    experts
        E expressions: names of attached adapters, compositions such as `"0.5 * a + b"`, None for the bare base.
    prior
        `"uniform"`; E numbers that sum to one; `"updating"`: after each call of `score`, an exponential average (rate
        0.3) of the mean posterior at the last position, starting from uniform; `"cached"`: the same over 100
        sequences given to `calibrate`, then frozen; `"fitted"`: the fixed weights that explain those sequences best.
    gamma, temperature
        See `router.ensemble.posterior`: 1 and 1 are Bayes.
    hedge
        Mixes weights that move at several rates, from Bayes' rule to standing still, by how well each has predicted
        (`router.ensemble.belief.Hedged`): for text of a new domain that several explain better together than one.
    prefix
        None weighs at token level: the posterior moves with every token. A number weighs at document level: that many
        predictions of each text move it, then its weights stay as they are.
    context, overlap, max_logits
        See `router.ensemble.experts.expert_log_probs`. Windows share one posterior: it runs over the whole text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: Sequence[Member],
        *,
        prior: Prior = "uniform",
        gamma: float = 1.0,
        temperature: float = 1.0,
        hedge: bool = False,
        prefix: int | None = None,
        context: int | None = None,
        overlap: int | None = None,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        self.model, self.experts = model, tuple(experts)
        self.mode = prior if isinstance(prior, str) else "given"
        if self.mode not in (*PRIORS, "given"):
            raise UsageError(f"unknown prior {self.mode!r}", hint=f"{', '.join(PRIORS)} or one number per expert")
        self.prior = bayes.log_prior(None if isinstance(prior, str) else prior, len(self.experts))
        self.calibrated = self.mode not in ("cached", "fitted")
        if prefix is not None and prefix < 0:
            raise UsageError(f"the prefix is {prefix} tokens", hint="0 keeps the prior, None reads the whole text")
        self.gamma, self.temperature, self.hedge, self.prefix = gamma, temperature, hedge, prefix
        self.context, self.overlap, self.max_logits = context, overlap, max_logits
        self._belief(self.prior, 1)  # what does not fit together is an error here, not at the first text

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EnsembleScore:
        """Score B texts (B, T), padded on either side, of any length; one forward pass for all experts.

        Raises
        ------
        UsageError
            A cached or fitted prior that was not calibrated, or shapes that do not fit.
        """
        log_prior = self._ready()
        log_probs, valid = self._read(input_ids, attention_mask)
        score = self._mix(log_probs, valid, log_prior)
        if self.mode == "updating":
            self.prior = bayes.moving_average(self.prior, score.final.mean(0).cpu())
        return score

    def calibrate(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Set a cached or fitted prior from up to 100 development texts (N, T), in their order; returns it, (E,)."""
        if self.mode not in ("cached", "fitted"):
            raise UsageError(f"the prior is {self.mode!r}, there is nothing to calibrate", hint="prior='cached'")
        if not len(input_ids):
            raise UsageError("no text to calibrate the prior on", hint=f"give up to {CACHED_SEQUENCES} sequences")
        mask = None if attention_mask is None else attention_mask[:CACHED_SEQUENCES]
        log_probs, valid = self._read(input_ids[:CACHED_SEQUENCES], mask)
        if self.mode == "fitted":
            self.prior = bayes.fitted(log_probs[:, valid].T).cpu()
        else:
            self.prior = bayes.log_prior(None, len(self.experts))
            for row in range(log_probs.shape[1]):
                one = self._mix(log_probs[:, row : row + 1], valid[row : row + 1], self.prior)
                self.prior = bayes.moving_average(self.prior, one.final[0].cpu())
        self.calibrated = True
        return self.prior.exp()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        epsilon: float = 0.0,
        collapse: float = 0.0,
        **options: Any,
    ) -> Generated:
        """Continue B prompts by the mixture; the posterior starts with the prompt and moves with each token.

        `options` are those of transformers' `generate` (max_new_tokens, do_sample, temperature, top_p, streamer...; no
        beams). The caches of all experts lie side by side in one batch. An expert whose weight on a text falls under
        `epsilon` is dropped for the rest of that text: the mixture then moves by less than epsilon per expert.

        Once no text's weights have moved by more than `collapse` (total variation) over 8 tokens, the posterior has
        settled: each text goes on with one merged adapter, `sum_e pi_e D_e`, at one row a text instead of E. That is no
        longer the mixture of probabilities but close to it where one expert has nearly all the weight; 0 never does it.
        """
        return generate(
            self.model,
            self.experts,
            input_ids,
            attention_mask,
            start=partial(self._belief, self._ready().to(self.model.device)),
            prefix=self.prefix,
            epsilon=epsilon,
            collapse=collapse,
            max_logits=self.max_logits,
            options=options,
        )

    def _mix(self, log_probs: Tensor, valid: Tensor, log_prior: Tensor) -> EnsembleScore:
        return mix(
            log_probs,
            valid,
            log_prior=log_prior,
            gamma=self.gamma,
            temperature=self.temperature,
            prefix=self.prefix,
            hedge=self.hedge,
        )

    def _belief(self, log_prior: Tensor, texts: int) -> Belief:
        return belief(log_prior, texts, gamma=self.gamma, temperature=self.temperature, hedge=self.hedge)

    def _ready(self) -> Tensor:
        if not self.calibrated:
            raise UsageError(f"the {self.mode} prior is not calibrated yet", hint="ensemble.calibrate(dev_input_ids)")
        return self.prior

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return expert_log_probs(
            self.model,
            self.experts,
            input_ids,
            attention_mask,
            context=self.context,
            overlap=self.overlap,
            max_logits=self.max_logits,
        )
