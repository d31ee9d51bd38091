"""Directories of the adapters library give the outputs that library gave (goldens: tests/golden/make_adapterhub.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compose
from compose.errors import KindError
from compose.formats import adapterhub
from compose.formats.directory import save_adapter
from compose.runtime.model_runtime import activate, runtime
from hub.errors import NotFound

GOLDEN = Path(__file__).parents[2] / "golden" / "adapterhub"
SINGLE = ["houlsby", "pfeiffer", "parallel", "prefix", "flat_prefix", "lora", "ia3", "second"]


@pytest.fixture
def model():
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        pad_token_id=1,
    )
    base = transformers.BertModel(config).eval()
    base.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return base


def off(model, name):
    """Largest difference at real tokens, and how much the adapter does."""
    golden = load_file(GOLDEN / "outputs.safetensors")
    mask = golden["mask"].bool()
    batch = {"input_ids": golden["ids"], "attention_mask": golden["mask"]}
    with torch.no_grad():
        ours = model(**batch).last_hidden_state
        activate(model, None)
        bare = model(**batch).last_hidden_state
    theirs = golden[name]
    return float((ours - theirs)[mask].abs().max()), float((bare - theirs)[mask].abs().max())


@pytest.mark.parametrize("name", SINGLE)
def test_same_outputs(model, name, tmp_path):
    adapter = compose.attach(model, "a", GOLDEN / name)
    activate(model, "a")
    gap, effect = off(model, name)
    assert gap < 1e-5 < 0.05 < effect
    save_adapter(adapter, tmp_path, runtime(model).sites)  # from here on it is one of ours
    compose.attach(model, "b", tmp_path)
    activate(model, "b")
    assert off(model, name)[0] < 1e-5


def test_a_union_is_a_sequence(model):
    sites = runtime(model).sites
    fields = json.loads((GOLDEN / "mam" / "adapter_config.json").read_text())
    parts = adapterhub.read(GOLDEN / "mam", fields, sites, model, name="mam")
    assert [part.kind for part in parts] == ["prefix", "bottleneck"]
    for part in parts:
        compose.attach(model, part.name.replace("mam.", ""), part)
    activate(model, "prefix >> bottleneck")
    assert off(model, "mam")[0] < 1e-5
    with pytest.raises(KindError, match=r"mam.prefix >> mam.bottleneck: no single one"):
        compose.attach(model, "mam", GOLDEN / "mam")


def test_a_stack_of_bottlenecks_is_a_sequence(model):
    for name in ("houlsby", "second"):
        compose.attach(model, name, GOLDEN / name)
    activate(model, "houlsby >> second")
    assert off(model, "stack")[0] < 1e-5


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("houlsby", {"phm_layer": True}, "phm_layer=True"),
        ("parallel", {"scaling": "learned"}, "scaling='learned'"),
        ("houlsby", {"inv_adapter": "nice"}, "inv_adapter='nice'"),
        ("lora", {"use_gating": True}, "use_gating=True"),
        ("lora", {"leave_out": [1]}, r"leave_out=\[1\]"),
        ("lora", {"architecture": "reft"}, "architecture='reft'"),
    ],
)
def test_what_no_kind_expresses_is_refused_by_name(model, name, change, says, tmp_path):
    directory = shutil.copytree(GOLDEN / name, tmp_path / name)
    fields = json.loads((directory / "adapter_config.json").read_text())
    fields["config"].update(change)
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(KindError, match=says):
        compose.attach(model, "a", directory)
    assert "a" not in runtime(model).adapters


def test_a_pickle_and_a_stray_tensor_are_refused(model, tmp_path):
    directory = shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
    held = load_file(directory / adapterhub.WEIGHTS)
    save_file({**held, "encoder.layer.9.output.loras.lora.lora_A": torch.ones(1)}, directory / adapterhub.WEIGHTS)
    with pytest.raises(KindError, match=r"encoder\.layer\.9\.output is no module"):
        compose.attach(model, "a", directory)
    (directory / adapterhub.WEIGHTS).rename(directory / adapterhub.PICKLE)
    with pytest.raises(NotFound, match="missing") as caught:
        compose.attach(model, "a", directory)
    assert "never read" in str(caught.value.hint)
