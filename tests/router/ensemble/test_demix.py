"""The ensemble is what its experts say one by one, mixed by Bayes' rule."""

from __future__ import annotations

import math

import pytest
import torch

import compose
from hub.errors import HubError, UsageError
from router import Ensemble
from router.ensemble.windows import windows

EXPERTS = ["a", "b", "c"]


@torch.no_grad()
def alone(model, expr, ids: torch.Tensor) -> torch.Tensor:
    """log p(x_{t+1} | x_<=t) of one unpadded text (T,), by a plain forward pass."""
    compose.activate(model, expr)
    log_probs = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
    return log_probs.gather(-1, ids[1:, None]).squeeze(-1)


def test_experts_folded_into_the_batch_equal_experts_alone(model, texts):
    members = ["a", "b", "c", None, "average(a, b)", "0.5 * a + c"]
    score = Ensemble(model, members).score(texts)
    for e, member in enumerate(members):
        for b, text in enumerate(texts):
            assert torch.allclose(score.expert_log_probs[e, b].double(), alone(model, member, text), atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "prefix", "prompt"])
def test_any_kind_can_be_an_expert(model, texts, kind):
    from_conftest = {"prefix": {"num_virtual_tokens": 3}, "prompt": {"num_virtual_tokens": 3}}.get(kind, {})
    adapter = compose.create(model, kind, from_conftest or None, name="new", seed=5)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    adapter.freeze()
    score = Ensemble(model, ["a", "new"]).score(texts)
    for b, text in enumerate(texts):
        assert torch.allclose(score.expert_log_probs[1, b].double(), alone(model, "new", text), atol=2e-5)


def test_regret_bound_for_every_text_and_expert(model, texts):
    score = Ensemble(model, EXPERTS, prior=[0.2, 0.7, 0.1]).score(texts)
    for b in range(len(texts)):
        for e, prior in enumerate([0.2, 0.7, 0.1]):
            expert = -float(score.expert_log_probs[e, b].double().sum())
            assert float(score.nll[b]) <= expert + math.log(1 / prior) + 1e-9
            assert float(score.regret[e, b]) == pytest.approx(float(score.nll[b]) - expert - math.log(1 / prior))


def test_posterior_sums_to_one_and_starts_at_the_prior(model, texts):
    score = Ensemble(model, EXPERTS, prior=[0.2, 0.7, 0.1], gamma=0.9).score(texts)
    assert score.posterior.shape == (3, 19, 3)
    assert torch.allclose(score.posterior.sum(-1), torch.ones(3, 19, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(score.posterior[:, 0], torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64).expand(3, 3))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_expert_order_does_not_matter(model, texts, gamma):
    here = Ensemble(model, ["a", "b", "c"], gamma=gamma).score(texts)
    there = Ensemble(model, ["c", "a", "b"], gamma=gamma).score(texts)
    assert torch.allclose(here.log_probs, there.log_probs, atol=1e-5)
    assert torch.allclose(here.posterior, there.posterior[..., [1, 2, 0]], atol=1e-4)


def test_one_hot_prior_is_the_expert(model, texts):
    score = Ensemble(model, EXPERTS, prior=[0.0, 1.0, 0.0]).score(texts)
    assert torch.equal(score.log_probs, score.expert_log_probs[1].double())


def test_uniform_ensemble_comes_from_the_same_forward_pass(model, texts):
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    score = Ensemble(model, EXPERTS).score(texts)
    assert len(calls) == 1
    uniform = score.reweighed(temperature=math.inf)
    blunt = score.reweighed(gamma=0.0)
    handle.remove()
    assert len(calls) == 1
    expected = score.expert_log_probs.double().logsumexp(0) - math.log(3)
    assert torch.allclose(uniform.log_probs, expected, atol=1e-12)
    assert torch.allclose(blunt.log_probs, Ensemble(model, EXPERTS, gamma=0.0).score(texts).log_probs, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, texts, side):
    lengths = [20, 13, 2]
    ids, mask = torch.ones_like(texts), torch.zeros_like(texts)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(20 - n, 20)
        ids[row, where], mask[row, where] = texts[row, :n], 1
    score = Ensemble(model, EXPERTS, gamma=0.95).score(ids, mask)
    assert score.tokens.tolist() == [n - 1 for n in lengths]
    for row, n in enumerate(lengths):
        one = Ensemble(model, EXPERTS, gamma=0.95).score(texts[row : row + 1, :n])
        assert torch.allclose(score.log_probs[row][score.valid[row]], one.log_probs[0], atol=2e-5)
        assert torch.allclose(score.posterior[row][score.valid[row]], one.posterior[0], atol=1e-4)
        assert torch.allclose(score.final[row], one.final[0], atol=1e-4)


@pytest.mark.parametrize("max_logits", [1, 3 * 61 * 3, 3 * 61 * 20 + 5])
def test_memory_bound_changes_nothing(model, texts, max_logits):
    mask = torch.ones_like(texts)
    mask[1, 15:] = 0
    mask[2, :4] = 0
    whole = Ensemble(model, EXPERTS).score(texts, mask)
    pieces = Ensemble(model, EXPERTS, max_logits=max_logits).score(texts, mask)
    assert torch.allclose(whole.expert_log_probs, pieces.expert_log_probs, atol=2e-5)


def test_memory_bound_holds(model, texts):
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    limit = 3 * 61 * 5
    Ensemble(model, EXPERTS, max_logits=limit).score(texts)
    handle.remove()
    assert max(sizes) <= limit
    assert sum(sizes) == 3 * 3 * 20 * 61


def test_windows_predict_each_token_once():
    for length in range(1, 60):
        for context in (2, 5, 16):
            for overlap in range(1, context):
                found = list(windows(length, context, overlap))
                assert [t for w in found for t in range(w.first, w.end)] == list(range(1, length))
                assert all(w.end - w.start <= context and w.start < w.first for w in found)
                assert all(w.first - w.start == overlap for w in found[1:])


def test_long_texts_go_by_windows_under_one_posterior(model):
    ids = torch.randint(3, 61, (1, 100), generator=torch.Generator().manual_seed(3))
    score = Ensemble(model, EXPERTS, overlap=16).score(ids)  # the model has 64 positions
    assert score.posterior.shape == (1, 99, 3)
    for e, expert in enumerate(EXPERTS):
        first, second = alone(model, expert, ids[0, :64]), alone(model, expert, ids[0, 48:])
        expected = torch.cat([first, second[15:]])
        assert torch.allclose(score.expert_log_probs[e, 0].double(), expected, atol=2e-5)
    carried = score.expert_log_probs[:, 0, :70].double().sum(1).softmax(0)
    assert torch.allclose(score.posterior[0, 70], carried, atol=1e-9)


def test_updating_prior_moves_after_each_call(model, texts):
    ensemble = Ensemble(model, EXPERTS, prior="updating")
    first = ensemble.score(texts)
    expected = 0.7 / 3 + 0.3 * first.final.mean(0)
    assert torch.allclose(ensemble.prior.exp(), expected, atol=1e-12)
    second = ensemble.score(texts)
    assert torch.allclose(second.posterior[:, 0], expected.expand(3, 3), atol=1e-12)


def test_cached_prior_is_calibrated_then_frozen(model, texts):
    ensemble = Ensemble(model, EXPERTS, prior="cached")
    with pytest.raises(UsageError, match="not calibrated"):
        ensemble.score(texts)
    prior = ensemble.calibrate(texts)
    expected = torch.full((3,), 1 / 3, dtype=torch.float64)
    for row in range(3):
        one = Ensemble(model, EXPERTS, prior=expected).score(texts[row : row + 1])
        expected = 0.7 * expected + 0.3 * one.final[0]
    assert torch.allclose(prior, expected, atol=1e-5)
    ensemble.score(texts)
    assert torch.equal(ensemble.prior.exp(), prior)


def test_what_was_active_stays_active(model, texts):
    compose.activate(model, "a")
    with torch.no_grad():
        before = model(input_ids=texts).logits
        model.train()
        Ensemble(model, EXPERTS).score(texts)
        assert model.training
        model.eval()
        assert torch.equal(model(input_ids=texts).logits, before)


def test_single_token_texts_have_no_prediction(model):
    score = Ensemble(model, EXPERTS).score(torch.tensor([[5], [6]]))
    assert score.log_probs.shape == (2, 0)
    assert torch.allclose(score.final, torch.full((2, 3), 1 / 3, dtype=torch.float64))


def test_nan_expert_is_named(model, texts):
    broken = compose.create(model, "ia3", None, name="broken")
    for parameter in broken.parameters():
        parameter.data.fill_(float("nan"))
    broken.freeze()
    with pytest.raises(HubError, match="NaN probabilities from broken"):
        Ensemble(model, ["a", "broken"]).score(texts)


def test_bad_arguments(model, texts):
    with pytest.raises(UsageError, match="at least one expert"):
        Ensemble(model, [])
    with pytest.raises(UsageError, match="unknown prior"):
        Ensemble(model, EXPERTS, prior="bayesian")
    with pytest.raises(UsageError, match="gamma"):
        Ensemble(model, EXPERTS, gamma=2.0)
    with pytest.raises(UsageError, match="temperature"):
        Ensemble(model, EXPERTS, temperature=0.0)
    with pytest.raises(UsageError, match="attention_mask"):
        Ensemble(model, EXPERTS).score(texts, torch.ones(3, 4))
    with pytest.raises(UsageError, match="not \\(texts, tokens\\)"):
        Ensemble(model, EXPERTS).score(texts[0])
    with pytest.raises(UsageError, match="overlap"):
        Ensemble(model, EXPERTS, overlap=64).score(texts)
    with pytest.raises(UsageError, match="calibrate"):
        Ensemble(model, EXPERTS).calibrate(texts)
