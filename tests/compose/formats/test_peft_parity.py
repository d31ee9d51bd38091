"""The same weights give the same outputs in PEFT and here, in both directions, and generate the same tokens."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from compose.formats.directory import export_peft, read_adapter
from compose.kind.registry import get_kind, make_config
from compose.runtime.model_runtime import activate, runtime

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
    "p-tuning": lambda **o: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8, **o),
}
TOLERANCE = 1e-5
CLOSE = {"atol": TOLERANCE, "rtol": TOLERANCE}  # how float32 rounds differs between processors


def base(tiny: Any, family: str) -> Any:
    return tiny.model(family, task="classification" if TASKS[family] == "SEQ_CLS" else "lm")


def randomize(model: Any) -> None:
    """Weights that do something: a fresh adapter would hide a wrong one."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.data if "ia3" in name or "magnitude" in name else 0.0
            parameter.data = kept + 0.2 * torch.randn(parameter.shape, generator=generator)


def peft_model(tiny: Any, family: str, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT's default does not fit GPT-2
        model = peft.get_peft_model(base(tiny, family), config)
    randomize(model)
    return model.eval()


@torch.no_grad()
def logits(tiny: Any, model: Any, family: str) -> torch.Tensor:
    """Logits at the real tokens of rows of two lengths; PEFT's have the virtual tokens in front, ours do not.

    Padded on the left where the model generates, but for T5, whose relative positions see the gap that PEFT leaves
    between a prompt and such text. PEFT drops the position ids of a prompt, so none are given.
    """
    inputs = tiny.batch(family, tiny.rows(9, 6, 9), side="left" if family in tiny.causal else "right")
    inputs.pop("position_ids", None)
    out = model(**inputs).logits
    if out.dim() == 2 or family == "t5":
        return out
    mask = inputs["attention_mask"].bool()
    return out[:, -mask.shape[1] :][mask]


@torch.no_grad()
def generated(tiny: Any, model: Any, family: str) -> torch.Tensor:
    """Greedy tokens of rows without padding (under left padding PEFT drops the position ids of a prompt)."""
    inputs = tiny.batch(family, tiny.rows(9, 9))
    given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    return model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None)


def attach(tiny: Any, family: str, directory: Any) -> tuple[Any, Any]:
    model = base(tiny, family)
    home = runtime(model)
    adapter = home.add("a", read_adapter(directory, home.sites, model, name="a"))
    activate(model, "a")
    return model, adapter


def export(tiny: Any, family: str, model: Any, adapter: Any, directory: Any) -> Any:
    """Export, and load in PEFT with every warning an error."""
    export_peft(adapter, directory, sites=runtime(model).sites, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base(tiny, family), directory).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TASKS)
def test_same_outputs_both_ways(tiny, family, kind, tmp_path):
    task = TASKS[family]
    theirs = peft_model(tiny, family, KINDS[kind](task_type=task))
    theirs.save_pretrained(tmp_path / "theirs")
    model, adapter = attach(tiny, family, tmp_path / "theirs")

    expected, got = logits(tiny, theirs, family), logits(tiny, model, family)
    torch.testing.assert_close(got, expected, **CLOSE)
    effect = (expected - logits(tiny, base(tiny, family), family)).abs().max()
    assert effect > 1e-3, "an adapter without effect would agree whatever we do"

    back = export(tiny, family, model, adapter, tmp_path / "ours")
    torch.testing.assert_close(logits(tiny, back, family), got, **CLOSE)
    if task != "SEQ_CLS":
        assert torch.equal(generated(tiny, model, family), generated(tiny, theirs, family))
        assert torch.equal(generated(tiny, back, family), generated(tiny, model, family))


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
def test_same_placement(tiny, name, kind, tmp_path):
    family, options = PLACEMENTS[name]
    options = dict(options, task_type=TASKS[family])
    if kind == "ia3":
        options = _for_ia3(options)
    theirs = peft_model(tiny, family, KINDS[kind](**options))
    theirs.save_pretrained(tmp_path / "theirs")
    model, adapter = attach(tiny, family, tmp_path / "theirs")
    assert set(adapter.paths) == set(theirs.base_model.targeted_module_names)
    torch.testing.assert_close(logits(tiny, model, family), logits(tiny, theirs, family), **CLOSE)
    back = export(tiny, family, model, adapter, tmp_path / "ours")
    assert set(back.base_model.targeted_module_names) == set(adapter.paths)
    torch.testing.assert_close(logits(tiny, back, family), logits(tiny, theirs, family), **CLOSE)


FIELDS: dict[str, tuple[str, Any]] = {
    "rank-and-alpha-patterns": (
        "llama",
        peft.LoraConfig(
            r=4,
            lora_alpha=10,
            target_modules=ALL,
            rank_pattern={"1.self_attn.q_proj": 2, "q_proj": 6, r"layers\.\d+\.mlp\.down_proj": 3},
            alpha_pattern={"0.self_attn.q_proj": 5, "mlp.up_proj": 2.5, "layers.0.mlp.down_proj": 7},
            use_rslora=True,
        ),
    ),
    "dora-rank-pattern": (
        "bert",
        peft.LoraConfig(r=4, use_dora=True, target_modules=["query", "dense"], rank_pattern={"query": 2}),
    ),
    "lora-bias": ("gpt2", peft.LoraConfig(r=4, lora_alpha=10, lora_bias=True)),
    "embeddings": ("llama", peft.LoraConfig(r=4, lora_alpha=10, target_modules=["embed_tokens", "v_proj"])),
    "embeddings-of-an-encoder": ("bert", peft.LoraConfig(r=4, target_modules=["word_embeddings"], use_rslora=True)),
    "lokr": ("llama", peft.LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "down_proj"], decompose_factor=4)),
    "lokr-whole-factors": ("bert", peft.LoKrConfig(r=32, alpha=32, target_modules=["query", "value", "dense"])),
    "lokr-patterns": (
        "opt",
        peft.LoKrConfig(r=2, target_modules=["fc1", "fc2"], rank_pattern={"fc1": 3}, alpha_pattern={"0.fc2": 5}),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_same_fields(tiny, name, tmp_path):
    family, config = FIELDS[name]
    config = copy.deepcopy(config)
    config.task_type = TASKS[family]
    theirs = peft_model(tiny, family, config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model, adapter = attach(tiny, family, tmp_path / "theirs")
    assert set(adapter.paths) == set(theirs.base_model.targeted_module_names)
    torch.testing.assert_close(logits(tiny, model, family), logits(tiny, theirs, family), **CLOSE)
    back = export(tiny, family, model, adapter, tmp_path / "ours")
    torch.testing.assert_close(logits(tiny, back, family), logits(tiny, theirs, family), **CLOSE)


def _for_ia3(options: dict[str, Any]) -> dict[str, Any]:
    """(IA)^3 has no layer filter, and its feed-forward modules are a subset of the targets."""
    options = {k: v for k, v in options.items() if not k.startswith("layers")}
    targets = options["target_modules"]
    wide = ("dense", "fc2", "wo", "down_proj", "attention.output.dense")
    marked = [] if isinstance(targets, str) else [t for t in targets if t in wide]
    return {**options, "feedforward_modules": marked}


def test_a_head_of_its_own_is_carried(tiny, tmp_path):
    theirs = peft_model(tiny, "bert", peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path / "theirs")
    model, adapter = attach(tiny, "bert", tmp_path / "theirs")
    assert adapter.config.modules_to_save == ("classifier",)
    trained = theirs.base_model.model.classifier.modules_to_save.default.weight
    assert torch.equal(adapter.head("classifier").weight, trained)
    assert not torch.equal(trained, base(tiny, "bert").classifier.weight)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt"])
def test_without_a_head_peft_gets_the_base_s(tiny, kind, tmp_path):
    model = base(tiny, "roberta")
    home = runtime(model)
    cls = get_kind(kind)
    adapter = home.add("a", cls(make_config(cls, {}), home.sites, model, name="a"))
    randomize(adapter)
    activate(model, "a")
    back = export(tiny, "roberta", model, adapter, tmp_path)
    torch.testing.assert_close(logits(tiny, back, "roberta"), logits(tiny, model, "roberta"), **CLOSE)


def test_a_projected_prefix_reads_as_its_output(tiny, tmp_path):
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    )
    theirs = peft_model(tiny, "gpt2", config)
    theirs.save_pretrained(tmp_path)
    model, _ = attach(tiny, "gpt2", tmp_path)
    torch.testing.assert_close(logits(tiny, model, "gpt2"), logits(tiny, theirs, "gpt2"), **CLOSE)
