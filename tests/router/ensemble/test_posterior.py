"""The posterior is exact: against sums over whole sequences, in float64, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import UsageError
from router.ensemble import posterior as bayes

EXPERTS = st.integers(1, 6)
LENGTHS = st.integers(1, 40)


def random_log_probs(seed: int, *shape: int, scale: float = 8.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(*shape, generator=generator, dtype=torch.float64)


def random_prior(seed: int, experts: int) -> torch.Tensor:
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).softmax(0)


def weights(log_probs: torch.Tensor, prior: torch.Tensor | None = None, gamma: float = 1.0, temperature: float = 1.0):
    before, _ = bayes.evidence(log_probs, gamma=gamma)
    return bayes.log_weights(before, bayes.log_prior(prior, log_probs.shape[-1]), temperature=temperature)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), EXPERTS, LENGTHS, st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.sampled_from([0.5, 1.0, 7.0])
)
def test_equals_the_written_out_formula(seed, experts, length, gamma, temperature):
    log_probs = random_log_probs(seed, length, experts)
    prior = random_prior(seed, experts)
    found = weights(log_probs, prior, gamma, temperature)
    for t in range(length):
        discounted = [
            sum(gamma ** (t - 1 - i) * float(log_probs[i, e]) for i in range(t)) / temperature for e in range(experts)
        ]
        raw = [math.log(float(prior[e])) + discounted[e] for e in range(experts)]
        top = max(raw)
        total = top + math.log(sum(math.exp(value - top) for value in raw))
        assert found[t].tolist() == pytest.approx([value - total for value in raw], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), EXPERTS, LENGTHS, st.floats(0, 1), st.floats(0.01, 100))
def test_sums_to_one(seed, experts, length, gamma, temperature):
    found = weights(random_log_probs(seed, length, experts), random_prior(seed, experts), gamma, temperature)
    assert torch.allclose(found.exp().sum(-1), torch.ones(length, dtype=torch.float64), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), EXPERTS, LENGTHS)
def test_regret_bound_and_telescoping_at_gamma_one(seed, experts, length):
    log_probs = random_log_probs(seed, length, experts, scale=30.0)
    prior = random_prior(seed, experts)
    mixed = bayes.mixture(weights(log_probs, prior), log_probs).sum()
    joint = torch.logsumexp(prior.log() + log_probs.sum(0), 0)
    assert float(mixed) == pytest.approx(float(joint), abs=1e-8)
    for e in range(experts):
        assert float(-mixed) <= float(-log_probs[:, e].sum()) + math.log(1 / float(prior[e])) + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), LENGTHS, st.sampled_from([0.0, 0.5, 1.0]))
def test_expert_order_does_not_matter(seed, experts, length, gamma):
    log_probs, prior = random_log_probs(seed, length, experts), random_prior(seed, experts)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    there = weights(log_probs, prior, gamma)[:, order]
    here = weights(log_probs[:, order], prior[order], gamma)
    assert torch.allclose(there, here, atol=1e-12)


def test_one_hot_prior_is_that_expert():
    log_probs = random_log_probs(3, 30, 4)
    found = weights(log_probs, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert torch.equal(found.exp(), torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64).expand(30, 4))
    assert torch.equal(bayes.mixture(found, log_probs), log_probs[:, 2])


def test_gamma_zero_sees_one_token():
    log_probs = random_log_probs(5, 20, 3)
    other = random_log_probs(6, 20, 3)
    other[10] = log_probs[10]
    assert torch.equal(weights(log_probs, gamma=0.0)[11], weights(other, gamma=0.0)[11])
    assert not torch.allclose(weights(log_probs, gamma=0.0)[12], weights(other, gamma=0.0)[12])


def test_infinite_temperature_keeps_the_prior():
    prior = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    found = weights(random_log_probs(7, 9, 3), prior, temperature=math.inf)
    assert torch.allclose(found.exp(), prior.expand(9, 3), atol=1e-15)


def test_evidence_of_thousands_of_nats_does_not_underflow():
    log_probs = torch.tensor([[-9.0, -10.0]]).repeat(5000, 1)
    found = weights(log_probs)
    assert float(found[-1, 0]) == 0.0
    assert float(found[-1, 1]) == pytest.approx(-4999.0, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_carried_over_in_pieces(gamma):
    log_probs = random_log_probs(11, 2, 25, 3)
    whole, end = bayes.evidence(log_probs, gamma=gamma)
    state, pieces = None, []
    for start in (0, 7, 8, 20):
        stop = {0: 7, 7: 8, 8: 20, 20: 25}[start]
        piece, state = bayes.evidence(log_probs[:, start:stop], gamma=gamma, start=state)
        pieces.append(piece)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-12)
    assert torch.allclose(state, end, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_padding_is_invisible(gamma):
    log_probs = random_log_probs(13, 12, 3)
    valid = torch.ones(12, dtype=torch.bool)
    valid[[0, 1, 5, 11]] = False
    before, end = bayes.evidence(log_probs, valid, gamma=gamma)
    clean_before, clean_end = bayes.evidence(log_probs[valid], gamma=gamma)
    assert torch.allclose(before[valid], clean_before, atol=1e-12)
    assert torch.allclose(end, clean_end, atol=1e-12)


def test_moving_average():
    prior = bayes.log_prior([0.5, 0.5], 2)
    moved = bayes.moving_average(prior, torch.tensor([1.0, 0.0]))
    assert moved.exp().tolist() == pytest.approx([0.65, 0.35])
    assert bayes.moving_average(moved, torch.tensor([0.0, 1.0])).exp().tolist() == pytest.approx([0.455, 0.545])


@pytest.mark.parametrize("prior", [[0.5, 0.6], [1.0], [-0.5, 1.5], [float("nan"), 1.0], [[0.5, 0.5]]])
def test_bad_prior(prior):
    with pytest.raises(UsageError, match="prior"):
        bayes.log_prior(prior, 2)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_bad_gamma(gamma):
    with pytest.raises(UsageError, match="gamma"):
        bayes.evidence(torch.zeros(3, 2), gamma=gamma)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(UsageError, match="temperature"):
        bayes.log_weights(torch.zeros(3, 2), torch.zeros(2), temperature=temperature)


def test_text_impossible_for_all_experts_is_an_error():
    with pytest.raises(UsageError, match="no expert"):
        bayes.log_weights(torch.full((2,), -torch.inf), bayes.log_prior(None, 2))
