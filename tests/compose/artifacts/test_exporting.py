"""`hub export`: PEFT reads it, vLLM's rules hold, a merged model says what the adapted one does; losses are told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compose
from hub.manifest import TrainedOn
from hub.store import Store

TINY = "builtin:tiny-lm"


@pytest.fixture
def export(cli, tmp_path: Path):
    def run(ref: str, form: str, *words: str, code: int = 0):
        result = cli("export", ref, "--format", form, "--to", str(tmp_path / "out"), "--json", *words)
        assert result.exit_code == code, result.output
        assert (tmp_path / "out").exists() == (code == 0)
        return json.loads(result.stdout) if code == 0 else result.stderr

    return run


def adapted(logits, ref: str):
    return logits(compose.load(TINY, ref, dtype="fp32"))


@pytest.mark.parametrize("name", ["a", "d", "i", "p", "q"])
def test_peft_reads_what_is_exported(name: str, store, export, logits, tmp_path: Path) -> None:
    export(f"ns/{name}", "peft")
    model = peft.PeftModel.from_pretrained(compose.load(TINY, dtype="fp32"), tmp_path / "out").eval()
    wanted = adapted(logits, f"ns/{name}")
    torch.testing.assert_close(logits(model)[:, -wanted.shape[1] :], wanted, atol=2e-4, rtol=2e-4)


def test_heads_are_joined_for_peft(store, stock, export, logits, tmp_path: Path) -> None:
    from hub.manifest import Draft
    from hub.pack import pack

    adapter = compose.create(stock.model, "lora", {"r": 2, "layers": (0,), "modules_to_save": ("norm",)}, name="h")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1
    compose.save(adapter.freeze(), tmp_path / "h", model=stock.model, task="causal_lm")
    pack(tmp_path / "h", Draft(name="ns/h", version="1.0.0", kind="lora", base=stock.base, task="causal_lm"))
    store.put(tmp_path / "h")
    export("ns/h", "peft")
    model = peft.PeftModel.from_pretrained(compose.load(TINY, dtype="fp32"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), adapted(logits, "ns/h"), atol=2e-4, rtol=2e-4)
    assert not (tmp_path / "out" / "extra.safetensors").exists()


def test_kinds_that_peft_lacks(store, export) -> None:
    told = export("ns/n", "peft", code=1)
    assert "bottleneck, which PEFT does not have" in told


def test_vllm_takes_plain_loras(store, export, tmp_path: Path) -> None:
    done = export("ns/a", "vllm", "--base-name", "served")
    assert any("--max-lora-rank 8" in note for note in done["notes"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "served"
    assert isinstance(config["target_modules"], list)


def test_vllm_is_given_one_rank_and_one_scale(store, stock, export, logits, tmp_path: Path) -> None:
    """It scales every pair by `lora_alpha / r` of the config: read by that rule, the file must say the same."""
    ranks, alphas = {"q_proj": 6, "0.mlp.down_proj": 3}, {"v_proj": 2.5, "1.self_attn.q_proj": 20}
    places = {"target_modules": ("q_proj", "v_proj", "down_proj"), "layers": (0, 1)}
    for name, rslora in (("plain", False), ("rooted", True)):
        options = {"r": 4, "lora_alpha": 10, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
        stock.publish(store, f"ns/{name}@1.0.0", tmp_path / name, made=("lora", {**options, **places}))
        done = export(f"ns/{name}", "vllm")
        out = (tmp_path / "out").rename(tmp_path / f"out-{name}")
        config = json.loads((out / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        tensors = load_file(out / "adapter_model.safetensors")
        model = compose.load(TINY, dtype="fp32")
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                assert len(a) == config["r"] == 6
                weight = model.get_submodule(
                    key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                ).weight
                weight.data += scale * tensors[key.replace("lora_A", "lora_B")] @ a
        torch.testing.assert_close(logits(model), adapted(logits, f"ns/{name}"), atol=2e-4, rtol=2e-4)
        assert any("filled with zeros" in note for note in done["notes"])


def test_a_merged_model_is_untied_where_one_end_changed(store, stock, export, logits, tmp_path: Path) -> None:
    stock.publish(
        store, "ns/ends@1.0.0", tmp_path / "ends", made=("lora", {"r": 2, "target_modules": ("embed_tokens",)})
    )
    done = export("ns/ends", "merged")
    assert any("lm_head.weight was tied" in note for note in done["notes"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    bare, wanted = logits(compose.load(TINY, dtype="fp32")), adapted(logits, "ns/ends")
    assert float((logits(model) - wanted).norm() / (wanted - bare).norm()) < 0.1


def test_compositions_and_other_kinds_become_one_lora(store, cli, export, logits, tmp_path: Path) -> None:
    assert cli("compose", "0.5 * ns/a + ns/b", "-o", "ns/both@1.0.0").exit_code == 0
    done = export("ns/both", "vllm")
    assert done["measured"]["discarded"] == pytest.approx(0, abs=1e-5)
    model = peft.PeftModel.from_pretrained(compose.load(TINY, dtype="fp32"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), adapted(logits, "ns/both"), atol=2e-3, rtol=2e-3)


def test_what_vllm_cannot_serve(store, cli, export, tmp_path: Path) -> None:
    assert "no change of weights" in export("ns/n", "vllm", "--rank", "4", code=1)
    assert cli("export", "ns/d", "--format", "vllm").exit_code == 1  # DoRA, and no rank is given
    done = export("ns/d", "vllm", "--rank", "8")
    assert 0 <= done["measured"]["discarded"] < 1


def test_merged_says_what_the_adapted_model_does(store, export, logits, tmp_path: Path) -> None:
    done = export("ns/a", "merged")
    assert done["measured"]["rounding"] > 0  # the built-in base is stored in bfloat16
    assert done["measured"]["effect"] < 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    bare, wanted = logits(compose.load(TINY, dtype="fp32")), adapted(logits, "ns/a")
    assert float((logits(model) - wanted).norm() / (wanted - bare).norm()) < 0.1
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_merging_what_was_trained_on_nf4(store, stock, export, tmp_path: Path) -> None:
    """A QLoRA adapter folded into the 16-bit weights is another model; that is measured, and can be had otherwise."""
    made = TrainedOn(quantization="nf4", double_quant=True, compute_dtype="float32")
    stock.publish(store, "ns/qa@1.0.0", tmp_path / "qa", trained_on=made)
    plain = export("ns/qa", "merged", "--quantize", "none")
    assert plain["measured"]["training"] > 0.02
    assert any("--quantize nf4 folds" in note for note in plain["notes"])
    (tmp_path / "out").rename(tmp_path / "plain")
    done = export("ns/qa", "merged")  # as it was trained, which is said
    assert 0.01 < done["measured"]["base_shift"] < 0.2
    assert done["measured"]["effect"] < 0.1
    assert "training" not in done["measured"]


def test_losses_of_merges_inside_a_composition_are_told_as_well(store, cli, export) -> None:
    cli("compose", "ties(ns/a, ns/b, rank=1)", "--merge", "-o", "ns/cut@1.0.0", "--base", TINY)
    lost = store.get("ns/cut").manifest.hyperparameters["certificate"]["discarded"]
    assert lost > 0.01
    cli("compose", "ns/cut + 0.5 * ns/b", "-o", "ns/around@1.0.0")
    for format, options in (("vllm", ("--rank", "4")), ("merged", ())):
        out = export("ns/around", format, *options)
        assert out["measured"]["merge_discarded"] == pytest.approx(lost)
        assert any(f"ns/cut@1.0.0 was published with {lost:.2%}" in note for note in out["notes"])
        shutil.rmtree(out["directory"])


def test_nothing_is_overwritten_and_nothing_half_written(store, cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert cli("export", "ns/a", "--format", "peft", "--to", str(tmp_path / "out")).exit_code == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert cli("export", "ns/a", "--format", "peft", "--rank", "3").exit_code == 2
    before = sorted(tmp_path.iterdir())
    assert cli("export", "ns/p", "--format", "merged", "--to", str(tmp_path / "no")).exit_code == 1
    assert sorted(tmp_path.iterdir()) == before
    assert Store().verify() == []


def test_options_of_another_format_are_refused(store, export) -> None:
    assert "--rank belongs to --format vllm, not to merged" in export("ns/a", "merged", "--rank", "3", code=2)
    assert "--base-name belongs to --format peft or vllm" in export("ns/a", "merged", "--base-name", "x", code=2)
    assert "--quantize belongs to --format merged" in export("ns/a", "peft", "--quantize", "nf4", code=2)


def test_formats_are_named_without_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from hub.cli import main\n"
        "told = CliRunner().invoke(main, ['export', '--help']).output\n"
        "assert 'merged|peft|sentence_transformers|vllm' in told, told\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_merge_that_was_cut_says_so_when_it_is_exported(store: Store, tmp_path: Path) -> None:
    for rank, format in {2: "peft", 3: "merged"}.items():
        _, made = compose.publish_merge(f"ties(ns/a, ns/b, rank={rank})", f"ns/cut{rank}@1.0.0")
        done = compose.export(f"ns/cut{rank}", format, tmp_path / format)
        assert 0.01 < done.measured["merge_discarded"] == pytest.approx(made.certificate.share)
        assert any("of its merge left out" in note for note in done.notes)
    compose.publish_merge("ties(ns/a, ns/b)", "ns/whole@1.0.0")
    assert "merge_discarded" not in compose.export("ns/whole", "merged", tmp_path / "whole").measured
