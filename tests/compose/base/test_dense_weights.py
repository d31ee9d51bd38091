"""What a quantization leaves as it is is said when a base is loaded: how much of it, and where."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compose
from compose.base.compatibility import BaseWarning
from compose.base.quantization import quantized_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("mlp.experts", {"intermediate_size": 128, "num_local_experts": 8}),
    "Qwen3Moe": (
        "mlp.experts",
        {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    ),
}


def saved(family: str, where: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(where)
    return where


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_fused_experts_that_stay_dense_are_named_with_their_share(tmp_path: Path, family: str, quantize: str) -> None:
    experts, fields = MIXTURES[family]
    directory = saved(family, tmp_path, **fields)
    whole = compose.load(directory)
    sizes = {name: p.numel() for name, p in whole.named_parameters()}
    share = sum(size for name, size in sizes.items() if experts in name) / sum(sizes.values())
    with pytest.warns(BaseWarning, match="leaves") as told:
        model = compose.load(directory, quantize=quantize)
    assert quantized_layers(model)
    said = next(str(w.message) for w in told if issubclass(w.category, BaseWarning))
    found = float(re.search(r"leaves ([0-9.]+)% of all parameters", said)[1]) / 100  # type: ignore[index]
    assert found == pytest.approx(share, abs=0.01) and found > 0.7
    assert "torch.bfloat16" in said and f"model.layers.*.{experts}.gate_up_proj ({family}Experts)" in said


def test_a_base_of_plain_linear_layers_is_loaded_without_a_word(tmp_path: Path) -> None:
    directory = saved("Llama", tmp_path, intermediate_size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseWarning)
        compose.load(directory, quantize="nf4")
