"""The same weights give the same outputs in PEFT and here, in both directions, and generate the same tokens."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from compose import inject, interop
from compose.kind import get_kind, make_config

TASKS = {
    "llama": "CAUSAL_LM",
    "qwen2": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "gpt_neox": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
}
KINDS: dict[str, Callable[..., Any]] = {  # PEFT's defaults decide where each one acts
    "lora": lambda **o: peft.LoraConfig(r=4, lora_alpha=10, **o),
    "rslora": lambda **o: peft.LoraConfig(r=4, lora_alpha=10, use_rslora=True, **o),
    "dora": lambda **o: peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, **o),
    "ia3": lambda **o: peft.IA3Config(**o),
    "prefix": lambda **o: peft.PrefixTuningConfig(num_virtual_tokens=5, **o),
    "prompt": lambda **o: peft.PromptTuningConfig(num_virtual_tokens=5, **o),
}
TOLERANCE = 1e-5


def randomize(model: Any) -> None:
    """Weights that do something: a fresh adapter would hide a wrong one."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.data if "ia3" in name or "magnitude" in name else 0.0
            parameter.data = kept + 0.2 * torch.randn(parameter.shape, generator=generator)


def peft_model(family: str, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT's default does not fit GPT-2
        model = peft.get_peft_model(base(family), config)
    randomize(model)
    return model.eval()


def batch(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    # Right padding with RoBERTa's padding token; and for T5, whose relative positions see the gap that PEFT leaves
    # between a prompt and text padded on the left.
    if FAMILIES[family][1] == "SEQ_CLS" or family == "t5":
        ids[1, -3:], mask[1, -3:] = 1, 0
    else:
        mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 100, (3, 6), generator=generator)
    return inputs


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    """Logits at real tokens; PEFT's have the virtual tokens in front, ours do not."""
    inputs = batch(family)
    out = model(**inputs).logits
    if out.dim() == 2:
        return out
    mask = inputs["attention_mask"] if family != "t5" else torch.ones_like(inputs["decoder_input_ids"])
    return out[:, -mask.shape[1] :][mask.bool()]


@torch.no_grad()
def generated(model: Any, family: str) -> torch.Tensor:
    """Greedy tokens of unpadded rows (under left padding PEFT drops the position ids of a prompt's generation)."""
    inputs = {k: v[[0, 2]] for k, v in batch(family).items() if k != "decoder_input_ids"}
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def attach(family: str, directory: Any) -> tuple[Any, Any]:
    model = base(family)
    runtime = inject.runtime(model)
    adapter = runtime.add("a", interop.read(directory, runtime.sites, model, name="a"))
    inject.activate(model, "a")
    return model, adapter


def export(family: str, model: Any, adapter: Any, directory: Any) -> Any:
    """Export, and load in PEFT with every warning an error."""
    interop.export_peft(adapter, directory, sites=inject.runtime(model).sites, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base(family), directory).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_outputs_both_ways(family, kind, tmp_path):
    task = FAMILIES[family][1]
    theirs = peft_model(family, KINDS[kind](task_type=task))
    theirs.save_pretrained(tmp_path / "theirs")
    model, adapter = attach(family, tmp_path / "theirs")

    expected, got = logits(theirs, family), logits(model, family)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    effect = (expected - logits(base(family), family)).abs().max()
    assert effect > 1e-3, "an adapter without effect would agree whatever we do"

    back = export(family, model, adapter, tmp_path / "ours")
    torch.testing.assert_close(logits(back, family), got, atol=TOLERANCE, rtol=0)
    if task != "SEQ_CLS":
        assert torch.equal(generated(model, family), generated(theirs, family))
        assert torch.equal(generated(back, family), generated(model, family))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLACEMENTS = {
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "all-linear-conv1d": ("gpt2", dict(target_modules="all-linear")),
    "every-linear": ("llama", dict(target_modules=ALL)),
    "regex": ("llama", dict(target_modules=r".*\.layers\.1\.self_attn\.(q|v)_proj")),
    "layers": ("llama", dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])),
    "one-layer": ("llama", dict(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers")),
    "exclude": ("bert", dict(target_modules=["query", "dense"], exclude_modules=["output.dense"])),
    "whole-path": ("gpt_neox", dict(target_modules=["gpt_neox.layers.0.attention.dense", "dense_h_to_4h"])),
    "suffix-of-two": ("bert", dict(target_modules=["attention.output.dense"])),
    "outside-the-blocks": ("bert", dict(target_modules=["dense"])),  # the pooler too
    "inside-a-head": ("roberta", dict(target_modules=["dense", "query"])),  # but not classifier.dense
    "language-head": ("llama", dict(target_modules=["lm_head", "q_proj"])),
    "cross-attention": ("t5", dict(target_modules=["EncDecAttention.k", "wo"])),
    "whole-head": ("llama", dict(target_modules=["up_proj"], modules_to_save=["lm_head"])),
    "whole-norm": ("opt", dict(target_modules=["fc2"], modules_to_save=["final_layer_norm"])),
}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_same_placement(name, kind, tmp_path):
    family, options = PLACEMENTS[name]
    options = dict(options, task_type=FAMILIES[family][1])
    if kind == "ia3":
        options = _for_ia3(options)
    theirs = peft_model(family, KINDS[kind](**options))
    theirs.save_pretrained(tmp_path / "theirs")
    model, adapter = attach(family, tmp_path / "theirs")
    assert set(adapter.paths) == set(theirs.base_model.targeted_module_names)
    torch.testing.assert_close(logits(model, family), logits(theirs, family), atol=TOLERANCE, rtol=0)
    back = export(family, model, adapter, tmp_path / "ours")
    assert set(back.base_model.targeted_module_names) == set(adapter.paths)
    torch.testing.assert_close(logits(back, family), logits(theirs, family), atol=TOLERANCE, rtol=0)


def _for_ia3(options: dict[str, Any]) -> dict[str, Any]:
    """(IA)^3 has no layer filter, and its feed-forward modules are a subset of the targets."""
    options = {k: v for k, v in options.items() if not k.startswith("layers")}
    targets = options["target_modules"]
    wide = ("dense", "fc2", "wo", "down_proj", "attention.output.dense")
    marked = [] if isinstance(targets, str) else [t for t in targets if t in wide]
    return {**options, "feedforward_modules": marked}


def test_a_head_of_its_own_is_carried(tmp_path):
    theirs = peft_model("bert", peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path / "theirs")
    model, adapter = attach("bert", tmp_path / "theirs")
    assert adapter.config.modules_to_save == ("classifier",)
    trained = theirs.base_model.model.classifier.modules_to_save.default.weight
    assert torch.equal(adapter.head("classifier").weight, trained)
    assert not torch.equal(trained, base("bert").classifier.weight)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt"])
def test_without_a_head_peft_gets_the_base_s(kind, tmp_path):
    model = base("roberta")
    runtime = inject.runtime(model)
    from compose.kind import get_kind, make_config

    cls = get_kind(kind)
    adapter = runtime.add("a", cls(make_config(cls, {}), runtime.sites, model, name="a"))
    randomize(adapter)
    inject.activate(model, "a")
    back = export("roberta", model, adapter, tmp_path)
    torch.testing.assert_close(logits(back, "roberta"), logits(model, "roberta"), atol=TOLERANCE, rtol=0)


def test_a_projected_prefix_reads_as_its_output(tmp_path):
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    )
    theirs = peft_model("gpt2", config)
    theirs.save_pretrained(tmp_path)
    model, _ = attach("gpt2", tmp_path)
    torch.testing.assert_close(logits(model, "gpt2"), logits(theirs, "gpt2"), atol=TOLERANCE, rtol=0)
