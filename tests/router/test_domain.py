"""DEMix beyond the mixture: document level, one merged adapter once settled, a new domain from the closest expert."""

from __future__ import annotations

import math

import pytest
import torch

import compose
from hub.errors import Conflict, UsageError
from router import Ensemble
from router.domain import closest, new_domain

EXPERTS = ["a", "b", "c"]


def test_document_level_weighs_by_the_prefix_alone(model, texts):
    token = Ensemble(model, EXPERTS).score(texts)
    document = Ensemble(model, EXPERTS, prefix=5).score(texts)
    assert torch.equal(document.posterior[:, :6], token.posterior[:, :6])
    assert torch.equal(document.posterior[:, 6:], token.posterior[:, 5:6].expand(-1, 13, -1)), "then they stand still"
    assert torch.equal(document.final, token.posterior[:, 5])
    assert torch.equal(token.reweighed(prefix=5).nll, document.nll)
    uniform = token.reweighed(temperature=math.inf)
    assert torch.allclose(token.reweighed(prefix=0).nll, uniform.nll), "no prefix heard is the prior"
    with pytest.raises(UsageError, match="prefix"):
        Ensemble(model, EXPERTS, prefix=-1)


def test_padding_does_not_count_towards_the_prefix(model, texts):
    padded = torch.cat([torch.ones(3, 4, dtype=torch.long), texts], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(texts)], 1)
    plain = Ensemble(model, EXPERTS, prefix=5).score(texts)
    assert torch.allclose(Ensemble(model, EXPERTS, prefix=5).score(padded, mask).nll, plain.nll, atol=1e-4)


OPTIONS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}


def test_document_level_generates_with_the_prompts_weights(model, texts):
    made = Ensemble(model, EXPERTS, prefix=4).generate(texts[:, :8], **OPTIONS)
    assert torch.allclose(made.posterior, made.posterior[:, :1].expand_as(made.posterior))
    wanted = Ensemble(model, EXPERTS, prefix=4).score(texts[:, :8]).final
    assert torch.allclose(made.posterior[:, 0], wanted, atol=1e-6)


def test_a_settled_posterior_collapses_to_one_merged_adapter(model, texts):
    prompt = texts[:2, :8]
    ensemble = Ensemble(model, ["a", "b", None], prefix=4)  # its weights stand still from the prompt on
    made = ensemble.generate(prompt, collapse=0.01, **OPTIONS)
    assert made.rows == (6,) * 9 + (2,) * 11, "E x B rows for 9 tokens, then one row a text"
    mixed = ensemble.generate(prompt, **OPTIONS)
    assert torch.equal(made.sequences[:, :17], mixed.sequences[:, :17])

    pi = made.posterior[:, -1]
    compose.activate(model, [f"{float(w[0])!r} * a + {float(w[1])!r} * b" for w in pi])
    alone = model.generate(made.sequences[:, :17], max_new_tokens=11, do_sample=False, eos_token_id=None)
    assert torch.equal(alone, made.sequences), "it goes on exactly as the merged adapter does"
    compose.activate(model, "c")
    ensemble.generate(prompt, collapse=0.01, **OPTIONS)
    assert [str(row) for row in compose.runtime.model_runtime.runtime(model).rows] == ["c"]
    for wrong in (-0.1, 1.5):
        with pytest.raises(UsageError, match="collapse"):
            ensemble.generate(prompt, collapse=wrong, **OPTIONS)


def test_one_expert_that_knows_it_all_is_what_it_collapses_to(model, texts):
    sure = Ensemble(model, EXPERTS, prior=[1.0, 0.0, 0.0])
    made = sure.generate(texts[:, :8], collapse=0.01, **OPTIONS)
    compose.activate(model, "a")
    assert torch.equal(made.sequences, model.generate(texts[:, :8], **OPTIONS))
    assert made.rows[-1] == 3


def test_a_new_domain_starts_as_the_closest_expert(model, texts):
    score = Ensemble(model, EXPERTS).score(texts)
    wanted = EXPERTS[int(score.expert_nll.sum(1).argmin())]
    name, evidence = closest(model, EXPERTS, texts)
    assert name == wanted and torch.allclose(evidence, -score.expert_nll.sum(1), atol=1e-3)
    adapter, source = new_domain(model, "new", EXPERTS, texts)
    assert source == wanted and adapter.trainable
    with torch.no_grad():
        compose.activate(model, "new")
        fresh = model(input_ids=texts).logits
        compose.activate(model, wanted)
        assert torch.allclose(fresh, model(input_ids=texts).logits, atol=1e-5)
        for parameter in adapter.parameters():
            parameter.add_(1.0)
        assert torch.allclose(fresh, model(input_ids=texts).logits, atol=1e-5), "a copy, not a view"
    with pytest.raises(Conflict):
        new_domain(model, "new", EXPERTS, texts)
    with pytest.raises(UsageError, match="no experts"):
        closest(model, [], texts)
    with pytest.raises(UsageError, match="no single adapter"):
        new_domain(model, "newer", ["0.5 * a"], texts)
