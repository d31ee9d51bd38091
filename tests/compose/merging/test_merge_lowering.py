"""Merged heads, one LoRA for mixed kinds, and folding into the base's own weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import compose
from compose.base.weights import dense_weight
from compose.errors import KindError
from compose.merging.fold import fold
from compose.merging.merge import lower_to_lora, merge
from compose.runtime.model_runtime import runtime

WEIGHTS = ("lora", "dora")  # kinds that add a matrix to a weight
VECTORS = ("ia3", "bias")
TENSORS = ("bottleneck", "prefix", "prompt")
Q = "model.layers.0.self_attn.q_proj"


def off(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other).norm() / other.norm())


# -- whole modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck"])
def test_heads_are_merged_relative_to_the_base(lab: Any, kind: str) -> None:
    home = lab("bert", task="classification")
    home.add(kind, "a", "b", modules_to_save=("classifier",))
    base = home.model.get_submodule("classifier").state_dict()
    heads = [runtime(home.model).adapters[n].head("classifier").state_dict() for n in "ab"]
    made = home.merge("task_arithmetic(a, b, weights=[2, -1])")
    for key, value in made.adapter.head("classifier").state_dict().items():
        wanted = base[key] + 2 * (heads[0][key] - base[key]) - (heads[1][key] - base[key])
        assert off(value, wanted) < 1e-5
    home.merge("average(a)")
    assert home.apart("merged", "a") < 1e-5
    home.merge("ties(a, density=1)")
    assert home.apart("merged", "a") < 1e-5


def test_heads_for_different_labels_are_not_merged(lab: Any) -> None:
    home = lab("bert", task="classification")
    home.add("lora", "a", "b", modules_to_save=("classifier",))
    a, b = (runtime(home.model).adapters[n] for n in "ab")
    a.labels = b.labels = ("no", "maybe", "yes")
    assert merge(home.model, "cat(a, b)").adapter.labels == a.labels
    b.labels = ("yes", "maybe", "no")
    with pytest.raises(KindError, match="different labels"):
        merge(home.model, "cat(a, b)")


# -- one LoRA for mixed kinds --------------------------------------------------------------------------------------

MIXED = ("0.5 * a + d", "a >> d", "d >> 0.5 * a", "a >> i", "i + j + a", "0.3 * (a >> i) + d", "average(d, e) >> i")


def mixed(lab: Any, family: str = "llama", dtype: str = "fp32") -> Any:
    home: Any = lab(family, dtype, **({"num_key_value_heads": 4} if family == "llama" else {}))
    places = ("attn.q", "attn.v") if family == "llama" else ("attn.qkv",)
    home.add("lora", "a", target_modules=(*places, "mlp.down"))
    home.add("dora", "d", "e", target_modules=places)
    home.add("ia3", "i", target_modules=(*places, "mlp.down"))
    home.add("ia3", "j", target_modules=places)
    return home


@pytest.mark.parametrize("text", MIXED)
def test_mixed_expressions_lower_to_one_lora(lab: Any, text: str) -> None:
    home = mixed(lab)
    made = lower_to_lora(home.model, text, rank=32, name="whole")
    compose.attach(home.model, "whole", made.adapter)
    assert made.adapter.kind == "lora"
    assert home.apart("whole", text) < 1e-4
    small = lower_to_lora(home.model, text, rank=5, name="small")
    compose.attach(home.model, "small", small.adapter)
    for path, loss in small.certificate.sites.items():
        exact, written = home.delta("whole", path), home.delta("small", path)
        best = torch.linalg.svdvals(exact)[5:].double().square().sum()
        left_out = (exact - written).double().square().sum()
        assert math.isclose(loss.discarded, float(left_out), rel_tol=1e-3, abs_tol=1e-8)
        assert float(left_out) < 1.02 * float(best) + 1e-8


def test_a_sum_of_loras_lowers_exactly_without_a_rank(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    made = lower_to_lora(home.model, "a - 0.5 * b")
    compose.attach(home.model, "m", made.adapter)
    assert made.certificate.exact and home.apart("m", "a - 0.5 * b") < 1e-5


@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_no_weight_is_not_lowered_or_folded(lab: Any, kind: str) -> None:
    home = lab()
    home.add("lora", "a")
    home.add(kind, "p")
    before = [name for name, _ in home.model.named_modules()]
    for act in (lambda: lower_to_lora(home.model, "a + p", rank=4), lambda: list(fold(home.model, "a + p"))):
        with pytest.raises(KindError, match=f"{kind} .*'p'"):
            act()
    assert [name for name, _ in home.model.named_modules()] == before


def test_the_lowered_lora_loads_in_peft(lab: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    home = mixed(lab)
    made = lower_to_lora(home.model, "a >> d", rank=8)
    compose.attach(home.model, "m", made.adapter)
    compose.save(made.adapter, tmp_path / "m", model=home.model)
    wanted = home.logits("m")
    compose.eject(home.model)
    theirs = PeftModel.from_pretrained(home.model, tmp_path / "m")
    with torch.no_grad():
        assert off(torch.cat(home.tiny.logits(theirs, home.batch)), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("text", ["a", "d", "i", "0.5 * a + d >> i", "ties(d, e, density=0.5, rank=4) + i"])
def test_merged_weights_are_the_active_adapter(lab: Any, family: str, text: str) -> None:
    home = mixed(lab, family)
    folded = {f.name: f for f in fold(home.model, text)}
    wanted = home.logits(text)
    compose.eject(home.model)
    state = home.model.state_dict()
    assert folded.keys() <= state.keys()
    home.model.load_state_dict({**state, **{name: f.value for name, f in folded.items()}})
    with torch.no_grad():
        got = torch.cat(home.tiny.logits(home.model, home.batch))
    assert off(got, wanted) < 1e-5
    assert all(f.rounding < 1e-4 for f in folded.values())


def test_folding_a_merge_needs_no_rank(lab: Any) -> None:
    home = lab("bert", task="classification")
    home.add("lora", "a", "b", target_modules=("attn.q",), modules_to_save=("classifier",))
    folded = {f.name: f.value for f in fold(home.model, "ties(a, b, density=0.5)")}
    home.merge("ties(a, b, density=0.5, rank=32)")  # all the rank there is
    wanted = home.logits("merged")
    home.merge("ties(a, b, density=0.5, rank=3)", "small")
    assert home.apart("small", "merged") > 0.05
    compose.eject(home.model)
    home.model.load_state_dict({**home.model.state_dict(), **folded})
    with torch.no_grad():
        assert off(torch.cat(home.tiny.logits(home.model, home.batch)), wanted) < 1e-5


def test_biases_and_heads_fold_too(lab: Any) -> None:
    home = lab("bert", task="classification")
    home.add("bias", "a", modules_to_save=("classifier",))
    folded = {f.name: f.value for f in fold(home.model, "a")}
    wanted = home.logits("a")
    compose.eject(home.model)
    home.model.load_state_dict({**home.model.state_dict(), **folded})
    with torch.no_grad():
        assert off(torch.cat(home.tiny.logits(home.model, home.batch)), wanted) < 1e-5


def test_folding_into_bfloat16_reports_what_rounding_loses(lab: Any) -> None:
    home = lab("llama", "bf16")
    home.add("lora", "a", noise=0.01)
    assert max(f.rounding for f in fold(home.model, "a")) > 0.05
    assert max(f.rounding for f in fold(home.model, "a", dtype=torch.float32)) < 1e-3


def test_folding_a_quantized_base_gives_its_dequantized_weight_changed(lab: Any) -> None:
    home = lab("llama", "nf4")
    home.add("lora", "a", target_modules=("attn.q",))
    found = next(f for f in fold(home.model, "a") if f.name == f"{Q}.weight")
    layer = home.model.get_submodule(Q)
    assert off(found.value, dense_weight(layer).float() + home.delta("a")) < 1e-6
