"""What PEFT loads without an error and we refuse by name: one row each, with PEFT's own answer beside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import compose
from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store

TINY = "builtin:tiny-lm"
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(stock, tmp_path_factory) -> Path:
    """A packed LoRA of the built-in base, which is a PEFT directory as well."""
    out = tmp_path_factory.mktemp("sound") / "a"
    adapter = stock.adapter("a")
    compose.save(adapter, out, model=stock.model, task="causal_lm")
    facts = {"kind": "lora", "base": stock.base, "task": "causal_lm", "placement": tuple(adapter.paths)}
    pack(out, Draft(name="acme/tone", version="1.0.0", **facts))
    return out


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})

    return edit


def config(**fields: object) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def nan(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in found if "lora_B" in name)
    found[name][0, 0] = float("nan")
    return found


# Packed again, as an author who does not know it would publish it; or changed after it was packed, on its way.
REPACKED = {
    "NaN weights": (tensors(nan), "holds 1 NaN or Inf"),
    "all keys under another prefix": (
        tensors(lambda t: {k.replace("base_model.model.", "base_model.model.module."): v for k, v in t.items()}),
        "missing base_model.model.model.layers.0",
    ),
    "half of the layers missing": (
        tensors(lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}),
        "missing base_model.model.model.layers.1",
    ),
    "tensors of layers that the base does not have": (
        tensors(lambda t: t | {k.replace("layers.1.", "layers.99."): v for k, v in t.items() if ".layers.1." in k}),
        "unexpected base_model.model.model.layers.99",
    ),
    "a config field of tomorrow": (config(a_field_of_tomorrow=7), "a_field_of_tomorrow=7"),
}
ON_THE_WAY = {
    "lora_alpha 8 -> 800": (config(lora_alpha=800), "adapter_config.json is not the file that was packed"),
    "one weight changed": (
        tensors(lambda t: {k: v * 1.001 for k, v in t.items()}),
        "adapter_model.safetensors is not the file that was packed",
    ),
}


def peft_loads(directory: Path) -> bool:
    """PEFT's own answer: whether it gives a model without raising."""
    model = peft.PeftModel.from_pretrained(compose.load(TINY, dtype="fp32"), directory)
    return isinstance(model, peft.PeftModel)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REPACKED)
def test_refused_when_it_is_published(name: str, sound: Path, cli, tmp_path: Path) -> None:
    edit, words = REPACKED[name]
    directory = shutil.copytree(sound, tmp_path / "a")
    edit(directory)
    assert peft_loads(directory)
    before = (directory / "module.json").read_bytes()
    result = cli("push", str(directory), "--repack", "--version", "1.0.1")
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert (directory / "module.json").read_bytes() == before
    assert Store().names() == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ON_THE_WAY)
def test_refused_when_it_was_changed_on_its_way(name: str, sound: Path, cli, tmp_path: Path) -> None:
    edit, words = ON_THE_WAY[name]
    directory = shutil.copytree(sound, tmp_path / "a")
    edit(directory)
    assert peft_loads(directory)
    result = cli("push", str(directory))
    assert result.exit_code == 1
    assert words in result.stderr
    assert Store().names() == []


def test_another_base_of_the_same_shape(sound: Path, cli, tmp_path: Path) -> None:
    assert cli("push", str(sound)).exit_code == 0
    other = compose.load(TINY)
    with torch.no_grad():
        other.model.layers[3].mlp.down_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    assert isinstance(peft.PeftModel.from_pretrained(other, sound), peft.PeftModel)
    result = cli("compose", "check", "acme/tone", "--base", str(tmp_path / "other"))
    assert result.exit_code == 1
    assert "model.layers.3.mlp.down_proj.weight" in result.stderr
    assert "--allow-base-drift" in result.stderr


def test_what_is_sound_passes_the_same_gates(sound: Path, cli) -> None:
    assert peft_loads(sound)
    assert cli("push", str(sound)).exit_code == 0
    assert Store().verify() == []


def test_a_base_that_is_not_at_hand_is_not_guessed(sound: Path, cli, stock, tmp_path: Path) -> None:
    """A base that cannot be tried is no base that was tried: refused, unless the trial is left out by name."""
    directory = shutil.copytree(sound, tmp_path / "a")
    tensors(lambda t: {k: v for k, v in t.items() if ".layers.1." not in k})(directory)
    base = {**stock.base.model_dump(), "config_digest": "sha256:" + "0" * 64}
    pack(directory, Draft(name="acme/other", version="1.0.0", kind="lora", base=base))
    result = cli("push", str(directory))
    assert result.exit_code == 1
    assert "cannot be tried: its base builtin:tiny-lm is not on this machine" in result.stderr
    assert "--no-trial" in result.stderr
    assert Store().names() == []
    assert cli("push", str(directory), "--no-trial").exit_code == 0
