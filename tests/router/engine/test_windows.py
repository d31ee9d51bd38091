"""Bases with sliding windows: their rows join and leave like others, and say what transformers' own generate says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import compose
from router.engine.batches.kv_cache import BlockLayer
from router.engine.engine import Engine
from router.engine.request import Request

spec = importlib.util.spec_from_file_location("traffic", Path(__file__).with_name("traffic.py"))
traffic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(traffic)
WINDOW = 6  # tokens
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "sliding_window": WINDOW,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
}


def base(family):
    make, config, options = MODELS[family]
    torch.manual_seed(1)
    return make(config(**{**SHAPE, **options})).eval()


def attach(model, name, kind, seed, **options):
    adapter = compose.create(model, kind, options or None, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapter.freeze()


@pytest.mark.parametrize("family", MODELS)
def test_rows_with_windows_join_and_leave(family, tokenizer):
    model = base(family)
    engine = Engine(model, tokenizer=tokenizer, rows=8)
    attach(model, "low", "lora", 1, r=2, target_modules="all-linear")
    attach(model, "front", "prompt", 2, num_virtual_tokens=5)
    asked = [
        Request(text=" ".join(f"w{4 + (7 * i + 3 * n) % 48}" for n in range(length)), adapter=name, max_new_tokens=new)
        for i, (length, name, new) in enumerate(
            [(3, None, 30), (20, "low", 6), (9, "front", 20), (1, "low", 25), (14, "front", 3), (9, "front", 12)]
        )
    ]
    wanted = []
    for request in asked:
        compose.activate(model, request.adapter)
        ids = tokenizer(request.text, return_tensors="pt").input_ids
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
            )
        wanted.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split())
    compose.activate(model, None)

    steps = traffic.Steps(engine)
    steps.work.pace.least = steps.work.pace.first = steps.work.pace.most = 8
    jobs, together = [], 0
    for request in asked:
        jobs.append(steps.submit(request))
        for _ in range(4):
            steps.turn()
        together = max(together, max((batch.running for batch in steps.work.batches), default=0))
    for job in jobs:
        steps.until(job)
    assert [job.row.answer.text.split() for job in jobs] == wanted
    assert together >= 3
    assert len(steps.work.batches) <= 1
    assert all(type(layer) is BlockLayer for batch in steps.work.batches for layer in batch.state.cache.layers)
    assert max(map(len, wanted)) > WINDOW
    engine.close()


def test_a_side_network_joins_rows_without_one(tokenizer):
    """A ladder keeps keys and values of its own in the cache: they come and go with its rows."""
    model = base("mistral")
    engine = Engine(model, tokenizer=tokenizer, rows=8)
    attach(model, "low", "lora", 1, r=2, target_modules="all-linear")
    attach(model, "side", "ladder", 2)
    names = ["low", "side", None, "side", "low", "side"]
    asked = [
        Request(text=f"w{5 + i} w{9 + i} w{20 - i}", adapter=n, max_new_tokens=4 + 5 * (i % 3))
        for i, n in enumerate(names)
    ]
    alone = [engine.run([request])[0].text for request in asked]
    steps, jobs = traffic.Steps(engine), []
    for request in asked:
        jobs.append(steps.submit(request))
        for _ in range(5):
            steps.turn()
    for job in jobs:
        steps.until(job)
    assert [job.row.answer.text for job in jobs] == alone
    assert len(set(alone)) > 3
    engine.close()
