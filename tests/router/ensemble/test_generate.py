"""Generation by the mixture equals scoring it: token by token, with the caches of all experts side by side."""

from __future__ import annotations

import pytest
import torch

import compose
from hub.errors import UsageError
from router import Ensemble

EXPERTS = ["a", "b", "c"]


def greedy_without_cache(ensemble: Ensemble, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """Extend one prompt (1, T) by scoring every candidate's mixture from scratch."""
    ids = prompt
    for _ in range(steps):
        candidates = torch.arange(61)[:, None]
        score = ensemble.score(torch.cat([ids.expand(61, -1), candidates], 1))
        ids = torch.cat([ids, score.log_probs[:, -1].argmax().view(1, 1)], 1)
    return ids


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_greedy_equals_scoring_without_a_cache(model, texts, gamma):
    ensemble = Ensemble(model, EXPERTS, gamma=gamma)
    found = ensemble.generate(texts[:, :8], max_new_tokens=6, eos_token_id=None)
    for row in range(3):
        assert torch.equal(found.sequences[row], greedy_without_cache(ensemble, texts[row : row + 1, :8], 6)[0])


def test_reports_the_log_probs_and_posteriors_of_its_own_text(model, texts):
    ensemble = Ensemble(model, EXPERTS, gamma=0.95, temperature=2.0)
    found = ensemble.generate(texts[:, :5], max_new_tokens=7, eos_token_id=None)
    score = ensemble.score(found.sequences)
    assert torch.allclose(found.log_probs, score.log_probs[:, 4:], atol=1e-5)
    assert torch.allclose(found.posterior, score.posterior[:, 4:], atol=1e-5)
    assert found.rows == (9,) * 7


def test_left_padded_prompts_generate_what_they_do_alone(model, texts):
    ensemble = Ensemble(model, EXPERTS)
    ids, mask = torch.ones(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.long)
    for row, n in enumerate([10, 4]):
        ids[row, 10 - n :], mask[row, 10 - n :] = texts[row, :n], 1
    found = ensemble.generate(ids, mask, max_new_tokens=6, eos_token_id=None)
    for row, n in enumerate([10, 4]):
        one = ensemble.generate(texts[row : row + 1, :n], max_new_tokens=6, eos_token_id=None)
        assert torch.equal(found.sequences[row, 10:], one.sequences[0, n:])
        assert torch.allclose(found.posterior[row], one.posterior[0], atol=1e-5)


def test_one_expert_is_transformers_own_generate(model, texts):
    compose.activate(model, "b")
    expected = model.generate(texts[:, :6], max_new_tokens=8, do_sample=False, eos_token_id=None)
    found = Ensemble(model, ["b"]).generate(texts[:, :6], max_new_tokens=8, eos_token_id=None)
    assert torch.equal(found.sequences, expected)


def test_processors_and_sampling_options_apply_to_the_mixture(model, texts):
    ensemble = Ensemble(model, EXPERTS)
    plain = ensemble.generate(texts[:1, :6], max_new_tokens=4, eos_token_id=None)
    banned = int(plain.sequences[0, 6])
    other = ensemble.generate(texts[:1, :6], max_new_tokens=4, eos_token_id=None, suppress_tokens=[banned])
    assert banned not in other.sequences[0, 6:].tolist()
    torch.manual_seed(3)
    first = ensemble.generate(texts[:, :6], max_new_tokens=5, do_sample=True, top_k=20, eos_token_id=None)
    torch.manual_seed(3)
    again = ensemble.generate(texts[:, :6], max_new_tokens=5, do_sample=True, top_k=20, eos_token_id=None)
    assert torch.equal(first.sequences, again.sequences)
    top1 = ensemble.generate(texts[:1, :6], max_new_tokens=4, do_sample=True, top_k=1, eos_token_id=None)
    assert torch.equal(top1.sequences, plain.sequences)


def test_sampling_follows_the_mixture(model, texts):
    ensemble = Ensemble(model, EXPERTS, prior=[0.5, 0.3, 0.2])
    torch.manual_seed(0)
    drawn = ensemble.generate(texts[:1, :6].expand(4000, -1), max_new_tokens=1, do_sample=True, top_k=0)
    seen = torch.bincount(drawn.sequences[:, -1], minlength=61).double() / 4000
    candidates = torch.cat([texts[:1, :6].expand(61, -1), torch.arange(61)[:, None]], 1)
    expected = ensemble.score(candidates).log_probs[:, -1].exp()
    assert float(expected.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float((seen - expected).abs().max()) < 0.03


def test_texts_end_apart_and_are_padded(model, texts):
    ensemble = Ensemble(model, EXPERTS)
    free = ensemble.generate(texts[:, :6], max_new_tokens=8, eos_token_id=None).sequences
    end = int(free[0, 8])  # whatever the first text says third is now the end of a text
    found = ensemble.generate(texts[:, :6], max_new_tokens=8, eos_token_id=end)
    for row in range(3):
        stop = (free[row, 6:] == end).nonzero().flatten()
        length = 6 + (int(stop[0]) + 1 if len(stop) else 8)
        width = found.sequences.shape[1]
        assert torch.equal(found.sequences[row, :length], free[row, :length])
        assert found.sequences[row, length:].tolist() == [1] * (width - length)
        assert float(found.log_probs[row, length - 6 :].abs().sum()) == 0.0


def test_dropping_negligible_experts_saves_rows_and_hardly_moves_the_mixture(model, texts):
    whole = Ensemble(model, EXPERTS).generate(texts[:, :12], max_new_tokens=8, eos_token_id=None)
    epsilon = 1e-3
    found = Ensemble(model, EXPERTS).generate(texts[:, :12], max_new_tokens=8, eos_token_id=None, epsilon=epsilon)
    assert found.rows[-1] < whole.rows[-1] == 9
    assert torch.equal(found.sequences, whole.sequences)
    assert torch.allclose(found.posterior.sum(-1), torch.ones(3, 8, dtype=torch.float64), atol=1e-12)
    assert float((found.posterior - whole.posterior).abs().max()) < 2 * epsilon
    assert float((found.log_probs - whole.log_probs).abs().max()) < 5 * epsilon
    gone = found.posterior[:, 0] == 0
    assert bool(gone.any())
    assert bool((found.posterior[gone.unsqueeze(1).expand_as(found.posterior)] == 0).all())  # for good


def test_dropping_an_impossible_expert_is_exact(model, texts):
    there = Ensemble(model, EXPERTS, prior=[0.5, 0.0, 0.5]).generate(texts[:, :6], max_new_tokens=5, eos_token_id=None)
    without = Ensemble(model, ["a", "c"]).generate(texts[:, :6], max_new_tokens=5, eos_token_id=None)
    assert torch.equal(there.sequences, without.sequences)
    assert there.rows[1:] == (6,) * 4
    assert torch.allclose(there.posterior[..., [0, 2]], without.posterior, atol=1e-5)


def test_the_prompt_is_read_in_bounded_pieces(model, texts):
    whole = Ensemble(model, EXPERTS).generate(texts, max_new_tokens=4, eos_token_id=None)
    pieces = Ensemble(model, EXPERTS, max_logits=9 * 61 * 7).generate(texts, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(whole.sequences, pieces.sequences)
    assert torch.allclose(whole.posterior, pieces.posterior, atol=1e-5)


def test_streamer_sees_prompt_tokens_and_end(model, texts):
    class Recorder:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    recorder = Recorder()
    found = Ensemble(model, EXPERTS).generate(texts[:1, :6], max_new_tokens=3, eos_token_id=None, streamer=recorder)
    assert recorder.seen == [*found.sequences[0].tolist(), "end"]


def test_what_was_active_stays_active(model, texts):
    compose.activate(model, "c")
    expected = model.generate(texts[:, :6], max_new_tokens=4, do_sample=False)
    Ensemble(model, EXPERTS).generate(texts[:, :6], max_new_tokens=4, epsilon=0.01)
    assert torch.equal(model.generate(texts[:, :6], max_new_tokens=4, do_sample=False), expected)


def test_bad_arguments(model, texts):
    with pytest.raises(UsageError, match="epsilon"):
        Ensemble(model, EXPERTS).generate(texts, epsilon=0.4)
    with pytest.raises(UsageError, match="beams"):
        Ensemble(model, EXPERTS).generate(texts, num_beams=2)
