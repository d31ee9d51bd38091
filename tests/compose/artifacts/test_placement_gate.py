"""`hub push` tries a directory on its base, wherever on this machine that lies; what cannot be tried is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import compose
from hub.project.known_bases import KnownBases
from hub.store import Store

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
NAME = ["--name", "acme/tone", "--version", "1.0.0"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Two models as they lie about on a disk; their directories' names mean nothing to the Hub."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(root / "llama")
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(root / "bert")
    return root


@pytest.fixture(scope="module")
def of_llama(bases: Path, tmp_path_factory) -> Path:
    """A LoRA for the Llama, as PEFT saves it."""
    import peft

    out = tmp_path_factory.mktemp("peft") / "a"
    model = LlamaForCausalLM.from_pretrained(bases / "llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(out)
    (out / "README.md").write_text("a card")
    return out


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_base_given_as_a_directory_is_tried(bases: Path, of_llama: Path, cli, tmp_path: Path) -> None:
    directory = shutil.copytree(of_llama, tmp_path / "a")
    result = cli("push", str(directory), *NAME, "--base", str(bases / "bert"))
    assert result.exit_code == 1
    assert "bert has no place for acme/tone@1.0.0" in result.stderr
    assert Store().names() == []
    assert not (directory / "module.json").exists()
    assert cli("push", str(directory), *NAME, "--base", str(bases / "llama")).exit_code == 0
    assert not (directory / "module.json").exists()


def test_a_folder_of_a_trainer_is_taken_as_import_takes_it(bases: Path, of_llama: Path, cli, tmp_path: Path) -> None:
    directory = shutil.copytree(of_llama, tmp_path / "checkpoint-3")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (directory / name).write_bytes(b"{}")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    asked = cli("push", str(directory))
    assert asked.exit_code == 2
    assert "missing: --name, --version, --base" in asked.stderr
    moved = shutil.copytree(bases / "llama", tmp_path / "renamed")
    result = cli("push", str(directory), *NAME, "--base", str(moved))
    assert result.exit_code == 0, result.output
    assert "left out: optimizer.pt, rng_state.pth, trainer_state.json, training_args.bin" in result.stderr
    assert f"names the base {bases / 'llama'}, and not {moved}" in result.stderr
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    files = set(Store().get("acme/tone").files)
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    again = cli("push", str(directory), "--name", "acme/tone", "--bump", "auto", "--base", str(bases / "llama"))
    assert again.exit_code == 0, again.output
    assert "names the base" not in again.stderr


def test_a_base_that_is_not_here_is_asked_for_and_then_remembered(
    bases: Path, of_llama: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    assert cli("push", str(of_llama), *NAME, "--base", str(bases / "llama")).exit_code == 0
    directory = Store().get("acme/tone").materialize(tmp_path / "a")
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "another machine"))
    result = cli("push", str(directory))
    assert result.exit_code == 1
    assert "cannot be tried: its base llama is not on this machine" in result.stderr
    assert Store().names() == []
    other = cli("push", str(directory), "--base", str(bases / "bert"))
    assert other.exit_code == 2
    assert "which states its facts, and not this base" in other.stderr
    assert cli("push", str(directory), "--base", str(bases / "llama")).exit_code == 0  # the one that it states
    assert cli("push", str(directory)).exit_code == 0  # remembered


def test_what_an_adapter_was_made_for_is_found_again(
    bases: Path, of_llama: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    """Without --base, and from any directory: the base is known by its weights, not by the name of its directory."""
    moved = shutil.copytree(bases / "llama", tmp_path / "kept elsewhere")
    assert cli("import", str(of_llama), *NAME, "--base", str(moved), "--probe").exit_code == 0
    (tmp_path / "cwd" / "kept elsewhere").mkdir(parents=True)  # of the same name, and nothing in it
    monkeypatch.chdir(tmp_path / "cwd")
    for words in (["export", "acme/tone", "--format", "merged", "--to", "out"], ["verify", "acme/tone", "--run"]):
        result = cli(*words)
        assert result.exit_code == 0, result.output
    assert (Path("out") / "model.safetensors").is_file()
    fingerprint = Store().get("acme/tone").manifest.base.weights_fingerprint
    assert KnownBases().directory(fingerprint) == moved.resolve()


def test_a_directory_that_holds_another_base_now_is_not_taken_for_it(
    bases: Path, of_llama: Path, cli, tmp_path: Path
) -> None:
    place = shutil.copytree(bases / "llama", tmp_path / "m" / "llama")
    assert cli("push", str(of_llama), *NAME, "--base", str(place)).exit_code == 0
    directory = Store().get("acme/tone").materialize(tmp_path / "a")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    result = cli("push", str(directory))
    assert result.exit_code == 1
    assert "is not on this machine" in result.stderr
    shutil.rmtree(place)
    assert cli("push", str(directory)).exit_code == 1
    compose.base.model.identity_of(bases / "llama")  # measured by whatever needs it, it is known
    assert cli("push", str(directory)).exit_code == 0
