"""What PEFT's merges get wrong, computed with PEFT, and what is right."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import compose

WEIGHTS = ("lora", "dora")  # kinds that add a matrix to a weight
VECTORS = ("ia3", "bias")
TENSORS = ("bottleneck", "prefix", "prompt")
Q = "model.layers.0.self_attn.q_proj"


def off(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other).norm() / other.norm())


def peft_pair(home: Any, tmp_path: Any, **options: Any) -> Any:
    """A PEFT model with LoRAs "a" and "b", the same two attached here, and PEFT's D at the q of layer 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(home.model), config, adapter_name="a")
    theirs.add_adapter("b", config)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    for name in "ab":
        compose.attach(home.model, name, tmp_path / name)
    layer = theirs.get_submodule(f"base_model.model.{Q}")
    return theirs, layer.get_delta_weight


@pytest.mark.parametrize(
    ("peft_way", "ours"),
    [
        ({"combination_type": "linear"}, "task_arithmetic(a, b, weights=[0.7, 0.6])"),
        (
            {"combination_type": "ties", "density": 1.0},
            "ties(a, b, weights=[.7, .6], variant=peft, density=1, rank=32)",
        ),
        ({"combination_type": "dare_linear", "density": 1.0}, "dare(a, b, weights=[0.7, 0.6], density=1, rank=32)"),
    ],
    ids=["linear", "ties", "dare"],
)
def test_peft_merges_factors_apart_and_mixes_adapters(lab: Any, tmp_path: Any, peft_way: Any, ours: str) -> None:
    from peft.utils import merge_utils

    home = lab(num_key_value_heads=4)
    theirs, delta = peft_pair(home, tmp_path)
    a, b = delta("a").detach(), delta("b").detach()
    right = 0.7 * a + 0.6 * b
    if "ties" in ours:
        right = merge_utils.ties([a, b], torch.tensor([0.7, 0.6]), density=1.0)
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.6], "wrong", **peft_way)
    assert off(delta("wrong"), right) > 0.5  # A_a B_b terms that belong to no adapter
    home.merge(ours)
    assert off(home.delta("merged"), right) < 1e-5


def test_peft_inflates_merges_of_rslora(lab: Any, tmp_path: Any) -> None:
    home = lab()
    theirs, delta = peft_pair(home, tmp_path, use_rslora=True)
    right = 0.7 * delta("a") + 0.6 * delta("b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.6], "wrong", combination_type="cat")
    assert off(delta("wrong"), math.sqrt(8) * right) < 1e-5  # sqrt of the merged rank too large
    for text in ("cat(a, b, weights=[0.7, 0.6])", "svd(a, b, weights=[0.7, 0.6])"):
        home.merge(text)
        assert off(home.delta("merged"), right) < 1e-5


def test_peft_merges_doras_silently_wrong(lab: Any, tmp_path: Any) -> None:
    home = lab()
    theirs, _ = peft_pair(home, tmp_path, use_dora=True)
    for name in "ab":  # magnitudes away from the norms of W, as training leaves them
        layer = theirs.get_submodule(f"base_model.model.{Q}").lora_magnitude_vector[name]
        layer.weight.data *= 1.5
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    for name in "ab":
        compose.attach(home.model, name, tmp_path / name)
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "wrong", combination_type="cat")
    theirs.set_adapter("wrong")
    right = home.logits("0.5 * a + 0.5 * b")
    with torch.no_grad():
        wrong = torch.cat(home.tiny.logits(theirs, home.batch))
    base = home.logits(None)
    assert float((wrong - right).norm() / (right - base).norm()) > 0.3
    for text in ("average(a, b)", "svd(a, b, weights=[0.5, 0.5])"):
        home.merge(text)
        assert home.apart("merged", "0.5 * a + 0.5 * b") < 1e-5


def test_cat_equals_peft_where_peft_is_right(lab: Any, tmp_path: Any) -> None:
    home = lab()
    theirs, delta = peft_pair(home, tmp_path)
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.6], "cat", combination_type="cat")
    home.merge("cat(a, b, weights=[0.7, -0.6])")
    assert off(home.delta("merged"), delta("cat")) < 1e-6
