"""Hedged weights: the recursion as it is written, what it guarantees, and that reading and generating agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import UsageError
from router import Ensemble
from router.ensemble import posterior as bayes
from router.ensemble.belief import RATES, Hedged, belief

SEEDS, EXPERTS, LENGTHS = st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 30)


def random_log_probs(seed, *shape, scale=8.0):
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(*shape, generator=generator, dtype=torch.float64)


def random_prior(seed, experts):
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).softmax(0).log()


def read(log_probs, prior, **options):
    """Weights (T, E) of one text, its NLL, and the belief after it."""
    start = belief(prior, 1, hedge=True, **options)
    weights, end = start.read(log_probs[None], torch.ones(1, len(log_probs), dtype=torch.bool))
    return weights[0], float(-bayes.mixture(weights[0], log_probs).sum()), end


@settings(max_examples=40, deadline=None)
@given(SEEDS, EXPERTS, LENGTHS, st.sampled_from([0.0, 0.03, 0.4, 1.0]))
def test_one_rate_is_the_written_out_recursion(seed, experts, length, eta):
    log_probs, prior = random_log_probs(seed, length, experts), random_prior(seed, experts)
    found, _, end = read(log_probs, prior, rates=(eta,))
    v = prior.exp().tolist()
    for t in range(length):
        assert found[t].exp().tolist() == pytest.approx(v, abs=1e-9)
        p = log_probs[t].exp().tolist()
        m = sum(share * q for share, q in zip(v, p, strict=True))
        v = [(1 - eta) * share + eta * share * q / m for share, q in zip(v, p, strict=True)]
    assert end.log_weights[0].exp().tolist() == pytest.approx(v, abs=1e-9)
    if eta == 1.0:
        before, _ = bayes.evidence(log_probs)
        assert torch.allclose(found, bayes.log_weights(before, prior), atol=1e-9), "which is Bayes' rule"


@settings(max_examples=60, deadline=None)
@given(SEEDS, EXPERTS, LENGTHS, st.sampled_from([1.0, 30.0]))
def test_never_worse_than_any_rate_any_expert_or_standing_still(seed, experts, length, scale):
    log_probs, prior = random_log_probs(seed, length, experts, scale=scale), random_prior(seed, experts)
    weights, nll, _ = read(log_probs, prior)
    assert torch.allclose(weights.exp().sum(-1), torch.ones(length, dtype=torch.float64), atol=1e-12)
    slack = math.log(len(RATES)) + 1e-9
    for eta in RATES:
        assert nll <= read(log_probs, prior, rates=(eta,))[1] + slack
    assert nll <= float(-bayes.mixture(prior.expand_as(log_probs), log_probs).sum()) + slack
    for e in range(experts):
        assert nll <= float(-log_probs[:, e].sum() - prior[e]) + slack


def test_text_that_several_explain_together_is_where_hedging_pays():
    """Each token is known to one of two experts in turn: Bayes settles on either, half and half is right."""
    log_probs = torch.full((200, 3), math.log(0.01), dtype=torch.float64)
    draw = torch.randint(2, (200,), generator=torch.Generator().manual_seed(0))
    log_probs[torch.arange(200), draw] = math.log(0.9)
    prior = bayes.log_prior(None, 3)
    weights, nll, _ = read(log_probs, prior)
    both = float(-bayes.mixture(torch.tensor([0.5, 0.5, 1e-12]).log(), log_probs).sum())
    assert nll < read(log_probs, prior, rates=(1.0,))[1] - 50
    assert nll < both + 15
    assert weights[100:].exp().mean(0).tolist() == pytest.approx([0.5, 0.5, 0.0], abs=0.2)


def test_carried_over_in_pieces_and_blind_to_padding():
    log_probs, prior = random_log_probs(3, 2, 20, 3), random_prior(3, 3)
    heard = torch.ones(2, 20, dtype=torch.bool)
    heard[0, [0, 7, 19]] = False
    whole, end = belief(prior, 2, hedge=True).read(log_probs, heard)
    state, pieces = belief(prior, 2, hedge=True), []
    for part in (slice(0, 6), slice(6, 6), slice(6, 20)):
        piece, state = state.read(log_probs[:, part], heard[:, part])
        pieces.append(piece)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-12)
    assert torch.allclose(state.log_weights, end.log_weights, atol=1e-12)
    clean, _ = belief(prior, 1, hedge=True).read(log_probs[:1, heard[0]], heard[:1, heard[0]])
    assert torch.allclose(whole[:1, heard[0]], clean, atol=1e-12)


def test_an_expert_that_is_ruled_out_leaves_its_share_to_the_others():
    _, _, end = read(random_log_probs(5, 12, 3), bayes.log_prior(None, 3))
    before = end.log_weights[0].exp()
    after = end.without(torch.tensor([[False, True, False]]))
    assert after.log_weights[0].exp().tolist() == pytest.approx(
        [float(before[0] / (before[0] + before[2])), 0.0, float(before[2] / (before[0] + before[2]))]
    )
    _, later = after.read(random_log_probs(6, 1, 4, 3), torch.ones(1, 4, dtype=torch.bool))
    assert float(later.log_weights[0, 1]) == -math.inf and bool(later.log_weights[0, ::2].isfinite().all())


def test_text_impossible_for_all_is_an_error():
    impossible = torch.full((1, 1, 2), -torch.inf)
    with pytest.raises(UsageError, match="no expert"):
        belief(bayes.log_prior(None, 2), 1, hedge=True).read(impossible, torch.ones(1, 1, dtype=torch.bool))


def test_a_hedged_ensemble_generates_as_it_scores(model, texts):
    ensemble = Ensemble(model, ["a", "b", "c"], hedge=True)
    made = ensemble.generate(texts[:, :8], max_new_tokens=6, do_sample=False, eos_token_id=None)
    score = ensemble.score(made.sequences)
    assert torch.allclose(made.posterior, score.posterior[:, 7:], atol=1e-5)
    assert torch.allclose(made.log_probs, score.log_probs[:, 7:], atol=1e-4)
    several = ensemble.generate(texts[:, :8], max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert len(several.sequences) == 2 * len(texts)
    plain = Ensemble(model, ["a", "b", "c"]).score(texts)
    assert torch.equal(plain.reweighed(hedge=True).nll, ensemble.score(texts).nll)
    assert bool((plain.reweighed(hedge=True).regret <= math.log(len(RATES)) + 1e-6).all())
    assert isinstance(ensemble._belief(ensemble.prior, 1), Hedged)
    for wrong in ({"gamma": 0.9}, {"temperature": 2.0}):
        with pytest.raises(UsageError, match="choose their own pace"):
            Ensemble(model, ["a"], hedge=True, **wrong)


def test_a_fitted_prior_is_the_likeliest_fixed_mixture(model, texts):
    log_probs = random_log_probs(9, 400, 3, scale=2.0)
    prior = bayes.fitted(log_probs).exp()
    share = (prior.log() + log_probs).softmax(-1).sum(0)
    assert torch.allclose(prior, (share + 1) / 403, atol=1e-4), "a fixed point of EM"
    assert bayes.fitted(log_probs[:0]).exp().tolist() == pytest.approx([1 / 3] * 3)

    ensemble = Ensemble(model, ["a", "b", "c"], prior="fitted", hedge=True)
    with pytest.raises(UsageError, match="fitted prior is not calibrated"):
        ensemble.score(texts)
    found = ensemble.calibrate(texts)
    read_ = Ensemble(model, ["a", "b", "c"]).score(texts)
    fixed = [read_.reweighed(prior=p, temperature=math.inf).nll.sum() for p in (found, [1 / 3] * 3)]
    assert float(fixed[0]) < float(fixed[1])
    assert float(ensemble.score(texts).nll.sum()) <= float(fixed[0]) + len(texts) * math.log(len(RATES))
