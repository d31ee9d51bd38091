"""The outline of a base: shapes without weights, costs counted, memory as it is after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compose.algebra import parse
from compose.base.model import load_base
from compose.errors import KindError
from compose.expr.tree import Ref
from compose.formats.directory import save_adapter
from compose.inspection.fake_base import FakeBase
from compose.kind.registry import kinds
from compose.planning.members import AdapterFinder
from hub.errors import GateError, HubError

TINY = "builtin:tiny-lm"
RANKED = 2 * 4 * (32 + 32 + 32 + 16)  # r = 4 at q (32 -> 32) and v (32 -> 16): operations a token and layer


@pytest.fixture(scope="module")
def home(tiny: Any, tmp_path_factory: Any) -> Any:
    """Directory of a family's model, config only unless asked for."""
    made: dict[str, Path] = {}

    def directory(family: str, **config: Any) -> Path:
        key = f"{family}{config}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base") / family
            tiny.model(family, **config).config.save_pretrained(made[key])
        return made[key]

    return directory


def saved(tiny: Any, family: str, kind: str, out: Path, **options: Any) -> Path:
    model = tiny.model(family)
    adapter = tiny.adapter(model, kind, kind, **options)
    return save_adapter(adapter, out, model.moduloom.sites, base="no/such-base")


def held_bytes(model: torch.nn.Module) -> int:
    total = sum(b.numel() * b.element_size() for b in model.buffers())
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        if state is not None:
            nested = [state.state2.absmax, state.offset] if state.nested else []
            total += sum(t.numel() * t.element_size() for t in (state.absmax, *nested))
        if scales is not None:
            total += scales.numel() * scales.element_size()
    return int(total)


@pytest.mark.parametrize(
    "options", [{}, {"quantize": "int8"}, {"quantize": "nf4"}, {"quantize": "nf4", "double_quant": False}]
)
def test_memory_is_what_loading_takes(options: dict[str, Any]) -> None:
    assert FakeBase(TINY, **options).bytes == held_bytes(load_base(TINY, **options))


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_memory_of_other_families(family: str, tiny: Any, tmp_path: Path) -> None:
    tiny.model(family).save_pretrained(tmp_path)
    assert FakeBase(tmp_path).bytes == held_bytes(load_base(tmp_path))
    if family != "t5":  # transformers warns there of what it keeps in float32; see test_base
        assert FakeBase(tmp_path, quantize="nf4").bytes == held_bytes(load_base(tmp_path, quantize="nf4"))


def test_every_kind_is_tried(tiny: Any, home: Any, tmp_path: Path) -> None:
    for family in ("llama", "t5"):
        outline = FakeBase(home(family))
        for kind in kinds():
            directory = saved(tiny, family, kind, tmp_path / f"{family}-{kind}")
            held = AdapterFinder().find(str(directory))
            adapter = outline.put(kind, held)
            shapes = {key: tuple(value.shape) for key, value in adapter.state().items()}
            assert shapes == {key: info.shape for key, info in held.tensors.items()}, (family, kind)
            assert sum(t.numel() for t in adapter.state().values()) == held.parameters
            free = ("bias", "ia3", "head", "attention_fusion", "sparse")  # or not counted: no matrix products
            assert outline.added_flops(Ref(kind)) > 0 or kind in free, (family, kind)


def test_costs_are_the_operations_of_the_factors(tiny: Any, home: Any, tmp_path: Path) -> None:
    outline = FakeBase(home("llama"))
    for name in ("a", "b"):
        outline.put(name, AdapterFinder().find(str(saved(tiny, "llama", "lora", tmp_path / name, seed=ord(name)))))
    one = 2 * RANKED * outline.length  # two layers
    assert outline.added_flops(parse("a")) == one
    assert outline.added_flops(parse("0.5 * a + b")) == 2 * one
    assert outline.added_flops(parse("average(a, b)")) == 2 * one
    assert outline.added_flops(parse("svd(a, b, rank=2)")) == one // 2
    assert outline.added_flops(parse("ensemble.mean(a, b)")) == 2 * one + outline.base_flops
    assert outline.added_flops(parse("0 * a")) == 0
    linear = sum(s.in_features * s.out_features for s in (*outline.sites, *outline.sites.outside.values()))
    attention = 2 * 2 * 32 * outline.length  # scores and their product with the values, in each of two layers
    assert outline.base_flops == 2 * outline.length * (linear + attention)


def test_merges_that_look_at_values_get_a_stand_in(tiny: Any, home: Any, tmp_path: Path) -> None:
    outline = FakeBase(home("llama"))
    for name in ("a", "b"):
        outline.put(name, AdapterFinder().find(str(saved(tiny, "llama", "lora", tmp_path / name, seed=ord(name)))))
    assert not outline.makes_adapter(parse("average(a, b)"))  # type: ignore[arg-type]
    assert outline.makes_adapter(parse("ties(a, b)"))  # type: ignore[arg-type]
    assert outline.added_flops(parse("ties(a, b, rank=4)")) == outline.added_flops(parse("a"))


def test_what_does_not_fit_is_named(tiny: Any, home: Any, tmp_path: Path) -> None:
    directory = saved(tiny, "llama", "lora", tmp_path / "a")
    with pytest.raises(KindError, match="q_proj"):
        FakeBase(home("llama", hidden_size=64)).put("a", AdapterFinder().find(str(directory)))
    with pytest.raises(HubError, match="target_modules"):
        FakeBase(home("bert")).put("a", AdapterFinder().find(str(directory)))


def test_a_base_of_seven_billion_is_outlined_from_its_config_alone(tmp_path: Path) -> None:
    hf.LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path)
    outline = FakeBase(tmp_path, quantize="nf4")
    assert outline.base_parameters == 6_738_415_616
    assert 3.5 * 2**30 < outline.bytes < 4 * 2**30
    assert len(list(outline.sites)) == 224


def test_models_without_a_task_of_ours_are_outlined_as_what_they_were_saved(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.ViTConfig(**sizes, image_size=32, architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)
    outline = FakeBase(tmp_path)
    assert {site.role for site in outline.sites} == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert outline.base_flops > 2 * 5 * sum(site.in_features * site.out_features for site in outline.sites)
    with pytest.raises(GateError, match="has no model for seq2seq"):
        FakeBase(tmp_path, task="seq2seq")


def test_what_looks_at_values_is_not_counted_and_not_called_wrong(
    tiny: Any, home: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = hf.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, architectures=["MixtralForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    assert FakeBase(tmp_path).base_flops is None
    outline = FakeBase(home("llama"))
    adapter = outline.put("a", AdapterFinder().find(str(saved(tiny, "llama", "lora", tmp_path / "a"))))
    assert outline.activate(Ref("a"))
    lower = type(adapter).lower

    def curious(self: Any, path: str, below: Any) -> Any:
        return lower(self, path, below) if float(self.at(path, "A").sum()) > -1e9 else None

    monkeypatch.setattr(type(adapter), "lower", curious)
    adapter.changed()  # what was lowered before is not used again
    assert not outline.activate(Ref("a"))
    assert outline.added_flops(parse("0.5 * a")) is None
    assert outline.added_flops(parse("ensemble.mean(2 * a, identity)")) is None


def test_a_model_that_asks_for_numbers_while_it_is_built_is_told(tmp_path: Path) -> None:
    hf.ConvNextConfig(architectures=["ConvNextForImageClassification"]).save_pretrained(tmp_path)
    with pytest.raises(GateError, match="cannot be built without weights"):
        FakeBase(tmp_path)


def test_the_cost_of_a_model_that_asks_for_more_than_a_text_is_not_counted(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 37, "max_position_embeddings": 32}
    config = hf.CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4})
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path)
    assert FakeBase(tmp_path).base_flops is None
