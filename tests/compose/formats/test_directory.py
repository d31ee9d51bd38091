"""Adapter directories: canonical bytes, exact reading back, and refusals that name what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compose.errors import KindError
from compose.formats.directory import export_peft, parse_config, read_adapter, save_adapter
from compose.formats.peft import short_targets
from compose.kind.registry import get_kind, kinds, make_config
from compose.runtime.model_runtime import runtime
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.errors import HubError, IntegrityError, NotFound
from hub.foreign.peft_config import PEFT_KINDS

OPTIONS = {"lora": {"r": 4}, "dora": {"r": 4}, "prefix": {"num_virtual_tokens": 3}, "prompt": {"num_virtual_tokens": 3}}


def llama(layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def adapter_of(kind, model, **options):
    cls = get_kind(kind)
    home = runtime(model)
    adapter = cls(make_config(cls, {**OPTIONS.get(kind, {}), **options}), home.sites, model, name="a", seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return home.add("a", adapter)


def saved(kind, model, directory, **options) -> Path:
    adapter = adapter_of(kind, model, **options)
    return save_adapter(adapter, directory, runtime(model).sites)


def read(model, directory):
    return read_adapter(directory, runtime(model).sites, model, name="b")


def edit(directory: Path, **fields) -> Path:
    path = directory / CONFIG
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_save_then_read_is_exact(kind, tmp_path):
    adapter = adapter_of(kind, model := llama())
    save_adapter(adapter, tmp_path, runtime(model).sites)
    again = read(model, tmp_path)
    assert (again.kind, again.paths, again.trainable) == (kind, adapter.paths, False)
    assert again.state().keys() == adapter.state().keys()
    assert all(torch.equal(v, adapter.state()[k]) for k, v in again.state().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reading_keeps_the_file_s_dtype(dtype, tmp_path):
    directory = saved("lora", llama(), tmp_path)
    tensors = {k: v.to(dtype) for k, v in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS)
    assert {v.dtype for v in read(llama(), directory).state().values()} == {dtype}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_directory import adapter_of, export_peft, llama, runtime, save_adapter
for kind, options in (("lora", {"target_modules": ["v_proj", "q_proj", "down_proj"]}), ("ia3", {}), ("prefix", {})):
    adapter, out = adapter_of(kind, model := llama(), **options), Path(sys.argv[2], kind)
    sites = runtime(model).sites
    save_adapter(adapter, out, sites, base="builtin:tiny", task="causal_lm")
    export_peft(adapter, out / "peft", sites=sites, model=model)
"""


def test_bytes_do_not_depend_on_the_process(tmp_path):
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        here = str(Path(__file__).parent)
        subprocess.run([sys.executable, "-c", SCRIPT, here, tmp_path / seed], check=True, env=environment)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) == 3 * 4
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_config_is_canonical(tmp_path):
    text = (saved("lora", llama(), tmp_path, target_modules=("v_proj", "q_proj")) / CONFIG).read_text()
    fields = json.loads(text)
    assert list(fields) == sorted(fields)
    assert fields["target_modules"] == ["q_proj", "v_proj"]
    assert fields["lora_alpha"] == 8 and isinstance(fields["lora_alpha"], int)
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], ["q_proj"]),
        (["model.layers.1.self_attn.q_proj"], ["1.self_attn.q_proj"]),
        (["model.layers.1.mlp.up_proj", "lm_head"], ["1.mlp.up_proj", "lm_head"]),
    ],
)
def test_targets_are_as_short_as_unambiguous(wanted, expected):
    sites = runtime(llama()).sites
    assert short_targets(wanted, sites) == expected
    assert [s.path for s in sites.select(tuple(expected))] == wanted


READ = {t for kind in kinds().values() for t in (kind.peft_type, *kind.peft_aliases)}


def test_hub_and_the_kinds_say_the_same_of_peft_types():
    for peft_type, kind in PEFT_KINDS.items():
        cls = get_kind(kind)
        assert peft_type in (cls.peft_type, *cls.peft_aliases)
    assert set(PEFT_KINDS) == READ - {None}


@pytest.mark.parametrize("peft_type", [t.value for t in PeftType if t.value not in READ])
def test_a_peft_type_without_a_kind_is_refused_by_name(peft_type):
    with pytest.raises(KindError, match=peft_type):
        parse_config({"peft_type": peft_type}, runtime(llama()).sites)


MEANINGFUL = {
    "bias": "all",
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "megatron_config": {"a": 1},
    "a_field_of_the_future": 3,
}


@pytest.mark.parametrize("field", MEANINGFUL)
def test_a_lora_field_that_changes_the_meaning_is_refused_by_name(field, tmp_path):
    directory = saved("lora", llama(), tmp_path)
    with pytest.raises(KindError, match=field):
        read(llama(), edit(directory, **{field: MEANINGFUL[field]}))


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal"])
def test_a_field_without_effect_on_the_outputs_is_not(init, tmp_path):
    directory = saved("lora", llama(), tmp_path)
    harmless = dict(init_lora_weights=init, peft_version="9.9", revision="main", qalora_group_size=16, future=None)
    assert read(llama(), edit(directory, **harmless)).kind == "lora"


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("lora", "r", 5),
        ("lora", "r", 0),
        ("lora", "r", "many"),
        ("lora", "lora_alpha", float("nan")),
        ("lora", "target_modules", ["q_proj"]),
        ("lora", "target_modules", ["nothing"]),
        ("lora", "target_modules", None),
        ("lora", "target_modules", {"q_proj": 1}),
        ("lora", "target_modules", "(q_proj"),
        ("lora", "target_modules", r"(.*)*(.*)*(.*)*(.*)*(.*)*Z"),
        ("lora", "layers_to_transform", "first"),
        ("lora", "modules_to_save", ["nothing"]),
        ("lora", "modules_to_save", "lm_head"),
        ("lora", "use_dora", True),
        ("ia3", "feedforward_modules", []),
        ("ia3", "target_modules", ["q_proj"]),
        ("prefix", "num_layers", 1),
        ("prefix", "num_attention_heads", 4),
        ("prefix", "token_dim", 16),
        ("prefix", "num_virtual_tokens", 4),
        ("prefix", "num_virtual_tokens", None),
        ("prompt", "token_dim", 8),
        ("prompt", "num_virtual_tokens", 2),
        ("prompt", "modules_to_save", ["lm_head"]),
    ],
)
def test_a_config_that_does_not_fit_is_refused(kind, field, value, tmp_path):
    model = llama()
    directory = edit(saved(kind, model, tmp_path), **{field: value})
    before = torch.cat([p.flatten() for p in model.parameters()])
    with pytest.raises(HubError) as caught:
        read(model, directory)
    assert str(caught.value) and not isinstance(caught.value, NotFound)
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), before)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    directory = saved("lora", llama(), tmp_path)
    tensors = load_file(directory / WEIGHTS)
    first = next(iter(tensors))

    def attempt(changed, message):
        save_file(changed, directory / WEIGHTS)
        with pytest.raises(KindError, match=message):
            read(llama(), directory)

    attempt({k: v for k, v in tensors.items() if k != first}, f"missing {first}")
    attempt({**tensors, "base_model.model.other": torch.zeros(1)}, "unexpected base_model.model.other")
    attempt({**tensors, first: torch.zeros(3, 3)}, "shape")
    attempt({**tensors, first.removeprefix("base_model.model."): tensors[first].clone()}, "twice")


def test_a_file_that_replaces_the_base_s_own_weight_is_refused(tmp_path):
    directory = saved("lora", model := llama(), tmp_path, target_modules=("lm_head",))
    tensors = load_file(directory / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, key: model.lm_head.weight.detach().clone()}, directory / WEIGHTS)
    assert read(llama(), directory).paths == ("lm_head",)
    save_file({**tensors, key: torch.zeros(50, 16)}, directory / WEIGHTS)
    with pytest.raises(KindError, match=r"lm_head\.weight"):
        read(llama(), directory)


def test_damaged_files_are_integrity_errors(tmp_path):
    directory = saved("lora", llama(), tmp_path)
    whole = (directory / WEIGHTS).read_bytes()
    for damaged in (whole[:-5], b"", b"\xff" * 200, whole[:7]):
        (directory / WEIGHTS).write_bytes(damaged)
        with pytest.raises(IntegrityError):
            read(llama(), directory)
    (directory / WEIGHTS).write_bytes(whole)
    for text in ("{", "[]", "null", "\udcff"):
        (directory / CONFIG).write_text(text, errors="surrogateescape")
        with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
            read(llama(), directory)


def test_a_pickle_is_never_read(tmp_path):
    directory = saved("lora", llama(), tmp_path)
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    with pytest.raises(NotFound) as caught:
        read(llama(), directory)
    assert "pickle" in (caught.value.hint or "")
    with pytest.raises(NotFound):
        read(llama(), tmp_path / "nowhere")


def test_a_head_stands_apart_in_an_artifact_and_inside_in_an_export(tmp_path):
    adapter = adapter_of("lora", model := llama(), modules_to_save=("lm_head",))
    sites = runtime(model).sites
    save_adapter(adapter, tmp_path / "own", sites)
    assert list(load_file(tmp_path / "own" / EXTRA)) == ["base_model.model.lm_head.weight"]
    export_peft(adapter, tmp_path / "peft", sites=sites, model=model)
    assert not (tmp_path / "peft" / EXTRA).exists()
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "peft" / WEIGHTS)
    for directory in ("own", "peft"):
        again = read(llama(), tmp_path / directory)
        assert torch.equal(again.head("lm_head").weight, adapter.head("lm_head").weight)


@pytest.mark.parametrize("kind", sorted(k for k, cls in kinds().items() if cls.peft_type is None))
def test_a_kind_that_peft_lacks_is_not_exported(kind, tmp_path):
    adapter = adapter_of(kind, model := llama())
    with pytest.raises(KindError, match=kind):
        export_peft(adapter, tmp_path, sites=runtime(model).sites, model=model)
    assert not list(tmp_path.iterdir())


def test_a_prompt_without_a_task_of_peft_s_is_not_exported(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    adapter = adapter_of("prompt", model := BertForMaskedLM(config).eval())
    with pytest.raises(KindError, match="BertForMaskedLM"):
        export_peft(adapter, tmp_path, sites=runtime(model).sites, model=model)


def test_exported_fields_are_all_fields_of_peft(tmp_path):
    for kind in ("lora", "dora", "ia3", "prefix", "prompt"):
        adapter = adapter_of(kind, model := llama())
        out = export_peft(adapter, tmp_path / kind, sites=runtime(model).sites, model=model)
        fields = json.loads((out / CONFIG).read_text())
        config = peft.PeftConfig.from_pretrained(out)
        assert fields.keys() <= config.to_dict().keys() | {"base_model_name_or_path"}
