"""The ensemble on other architectures and quantized bases: positions and caches differ, the law does not."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import compose
from hub.errors import UsageError
from router import Ensemble

SMALL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **SMALL))


def opt():
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2, **shape, **SMALL))


def with_experts(model, *names):
    for seed, name in enumerate(names):
        adapter = compose.create(model, "lora", {"r": 4, "target_modules": "all-linear"}, name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        adapter.freeze()
    return model.eval()


@pytest.mark.parametrize("make", [gpt2, opt])
def test_left_padding_and_caches_on_other_families(make, texts):
    torch.manual_seed(0)
    model = with_experts(make(), "a", "b")
    ids, mask = torch.ones(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    for row, n in enumerate([14, 6]):
        ids[row, 14 - n :], mask[row, 14 - n :] = texts[row, :n], 1
    score = Ensemble(model, ["a", "b"]).score(ids, mask)
    pieces = Ensemble(model, ["a", "b"], max_logits=61 * 5).score(ids, mask)
    assert torch.allclose(score.expert_log_probs, pieces.expert_log_probs, atol=2e-5)
    found = Ensemble(model, ["a", "b"]).generate(ids, mask, max_new_tokens=5, eos_token_id=None)
    for row, n in enumerate([14, 6]):
        one = Ensemble(model, ["a", "b"]).score(texts[row : row + 1, :n])
        assert torch.allclose(score.log_probs[row][score.valid[row]], one.log_probs[0], atol=2e-5)
        alone = Ensemble(model, ["a", "b"]).generate(texts[row : row + 1, :n], max_new_tokens=5, eos_token_id=None)
        assert torch.equal(found.sequences[row, 14:], alone.sequences[0, n:])


@torch.no_grad()
def test_experts_on_an_nf4_base_equal_experts_alone():
    model = with_experts(compose.load("builtin:tiny-lm", quantize="nf4", dtype=torch.float32), "a", "b")
    ids = torch.randint(5, 4096, (2, 40), generator=torch.Generator().manual_seed(1))
    score = Ensemble(model, ["a", "b", None]).score(ids)
    for e, member in enumerate(["a", "b", None]):
        compose.activate(model, member)
        log_probs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        expected = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        assert torch.allclose(score.expert_log_probs[e].double(), expected, atol=5e-4)


def test_half_precision_bases_are_mixed_in_double(texts):
    torch.manual_seed(0)
    model = with_experts(gpt2(), "a", "b").to(torch.bfloat16)
    score = Ensemble(model, ["a", "b"]).score(texts)
    assert score.expert_log_probs.dtype == torch.float32
    assert score.log_probs.dtype == torch.float64
    assert float(score.regret.max()) <= 1e-9


def test_models_that_do_not_read_left_to_right_are_refused():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    bert = BertForMaskedLM(BertConfig(vocab_size=61, **shape))
    for model in (t5, bert):
        with pytest.raises(UsageError, match="left to right"):
            Ensemble(model, [None]).score(torch.ones(1, 3, dtype=torch.long))
