"""A tiny random Llama (GQA) with experts of mixed kinds, all far from the identity."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compose

VOCABULARY = 61


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def attach_random(model, name: str, kind: str, seed: int, **config) -> None:
    adapter = compose.create(model, kind, config or None, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    adapter.freeze()


@pytest.fixture
def model():
    made = tiny_llama()
    attach_random(made, "a", "lora", 1, r=4, target_modules="all-linear")
    attach_random(made, "b", "lora", 2, r=2, target_modules="all-linear")
    attach_random(made, "c", "ia3", 3)
    return made


@pytest.fixture
def texts() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def attach():
    """Attach one more frozen adapter with random parameters: attach(model, name, kind, seed, **config)."""
    return attach_random
