"""What PEFT writes and computes with is read and computes the same: odd keys, copies, ranks, fields; or is refused."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

import compose
from compose.base.compatibility import BaseWarning
from compose.errors import KindError
from hub.cli import main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(5, 25)[None]
PLAIN = {"r": 4, "target_modules": ["q_proj"]}


def llama(*, tied: bool = False, rows: int = 96) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    if rows != len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def trained(directory: Path, base: LlamaForCausalLM, *, embeddings: bool | str = "auto", **options) -> torch.Tensor:
    """Save what PEFT has of an adapter all of whose tensors have moved; its logits."""
    model = peft.get_peft_model(base, peft.LoraConfig(**{**PLAIN, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(directory, save_embedding_layers=embeddings)
        return model.eval()(IDS).logits


def ours(directory: Path, base: LlamaForCausalLM) -> torch.Tensor:
    compose.attach(base, "a", directory)
    compose.activate(base, "a")
    with torch.no_grad():
        return base(IDS).logits


def rename(directory: Path, change) -> None:
    tensors = {change(key): value for key, value in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit(directory: Path, **fields) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    "options",
    [
        {"embeddings": True},
        {"embeddings": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"ensure_weight_tying": True},
        {"r": 64, "target_modules": "all-linear"},
        {"init_lora_weights": "mica"},
        {"rank_pattern": {"k_proj": 40}, "target_modules": ["q_proj", "k_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_computes_what_peft_does(options, tied, tmp_path: Path) -> None:
    want = trained(tmp_path, llama(tied=tied), **options)
    torch.testing.assert_close(ours(tmp_path, llama(tied=tied)), want, atol=1e-5, rtol=1e-5)


def test_keys_that_name_the_adapter(tmp_path: Path) -> None:
    want = trained(tmp_path, llama(), modules_to_save=["lm_head"])
    rename(tmp_path, lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."))
    rename(tmp_path, lambda key: key.replace("lm_head.", "lm_head.modules_to_save.default."))
    torch.testing.assert_close(ours(tmp_path, llama()), want)


def test_the_untrained_twin_of_a_trained_module_counts_for_nothing(tmp_path: Path) -> None:
    want = trained(tmp_path, llama(), modules_to_save=["lm_head"])
    twin = {"base_model.model.lm_head.original_module.weight": torch.zeros(96, 32)}
    save_file({**load_file(tmp_path / WEIGHTS), **twin}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    torch.testing.assert_close(ours(tmp_path, llama()), want)


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=96, num_key_value_heads=2)
    sight = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=sight)).eval()


def test_modules_under_their_old_names(tmp_path: Path) -> None:
    """LLaVA's language model was `language_model.model` up to transformers 4.51."""
    want = trained(tmp_path, llava(), exclude_modules=".*vision.*")
    rename(tmp_path, lambda key: key.replace("model.language_model.", "language_model.model."))
    assert all(key.startswith("base_model.model.language_model.model.") for key in load_file(tmp_path / WEIGHTS))
    torch.testing.assert_close(ours(tmp_path, llava()), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["q_proj", "w1"]])
def test_layers_inside_experts_are_told_where_experts_are_one_parameter(targets, tmp_path: Path) -> None:
    """Up to transformers 4 Mixtral had a layer for each expert: `block_sparse_moe.experts.0.w1`."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    inside = [f"block_sparse_moe.experts.{e}.{w}" for e in (0, 1) for w in targets if w != "q_proj"]
    tensors = {}
    for path in [*inside, *(["self_attn.q_proj"] if "q_proj" in targets else [])]:
        stem = f"base_model.model.model.layers.0.{path}"
        inner, outer = (24, 16) if path.endswith("w2") else (16, 16) if path.endswith("q_proj") else (16, 24)
        tensors |= {f"{stem}.lora_A.weight": torch.ones(2, inner), f"{stem}.lora_B.weight": torch.ones(outer, 2)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(KindError) as told:
        ours(tmp_path, model)
    assert "model.layers.0.mlp.experts.gate_up_proj" in f"{told.value} {told.value.hint}"


def test_eight_bit_floats_are_read_as_they_are(tmp_path: Path) -> None:
    trained(tmp_path, llama())
    exact = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file({key: value.float() for key, value in exact.items()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    want = ours(tmp_path, llama())
    save_file(exact, tmp_path / WEIGHTS, metadata={"format": "pt"})
    torch.testing.assert_close(ours(tmp_path, llama()), want)


NEW = torch.tensor([[3, 97, 5, 99, 11, 98]])  # tokens that the base does not have among them


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_belongs_to_its_adapter(tied, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(rows=100, tied=tied), peft.LoraConfig(**PLAIN))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    model = llama(tied=tied)
    with torch.no_grad():
        bare, want = model(IDS).logits, theirs.eval()(NEW).logits
        compose.attach(model, "a", tmp_path / "a")
        compose.activate(model, "a")
        assert want.shape[-1] == 100
        torch.testing.assert_close(model(NEW).logits, want, atol=1e-5, rtol=1e-5)
        told = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(NEW)}
        assert torch.equal(model.generate(NEW, **told), theirs.generate(input_ids=NEW, **told))
        compose.create(model, "lora", name="b")
        for rows in (["a", None], ["a", "b"], "0.5 * a", "a + b"):
            compose.activate(model, rows)
            if rows == "a + b":  # b brings no table of its own
                assert model(NEW).logits.shape[-1] == 100
                continue
            with pytest.raises(KindError, match="adapter 'a' has a vocabulary of its own, of 100 tokens"):
                model(NEW.expand(2, -1))
        compose.activate(model, None)
        assert torch.equal(model(IDS).logits, bare)  # the base stays as it was, with its own tokens
        assert len(model.get_input_embeddings().weight) == model.config.vocab_size == 96
    other = llama(tied=tied)
    other.get_input_embeddings().weight.data += 1
    with pytest.raises(KindError, match=r"(embed_tokens|lm_head)\.weight by another, with more rows"):
        compose.attach(other, "a", tmp_path / "a")


def test_adapters_of_two_resized_vocabularies_do_not_stand_side_by_side(tmp_path: Path) -> None:
    for name, rows in (("a", 100), ("b", 104)):
        trained(tmp_path / name, llama(rows=rows), embeddings=True)
    model = llama()
    compose.attach(model, "a", tmp_path / "a")
    compose.attach(model, "b", tmp_path / "b")
    compose.activate(model, ["a", "b"])
    with pytest.raises(KindError, match="has a vocabulary of its own"):
        model(NEW.expand(2, -1))
    compose.activate(model, "b")
    assert model(torch.tensor([[103]])).logits.shape[-1] == 104


@pytest.mark.parametrize("command", ["push", "import"])
@pytest.mark.parametrize("rows", [96, 100])
def test_copies_of_tables_pass_the_gates(command, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    llama().save_pretrained(tmp_path / "base")
    want = trained(tmp_path / "a", llama(rows=rows), embeddings=True)
    facts = ["--name", "x/a", "--version", "1.0", "--base", str(tmp_path / "base")]
    done = CliRunner().invoke(main, [command, str(tmp_path / "a"), *facts])
    assert done.exit_code == 0, done.output
    with torch.no_grad():
        torch.testing.assert_close(compose.load(tmp_path / "base", "x/a")(IDS).logits, want, atol=1e-5, rtol=1e-5)


def test_copies_of_another_base_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, llama(), embeddings=True)
    other = llama()
    other.get_input_embeddings().weight.data += 1
    with pytest.raises(KindError, match=r"embed_tokens\.weight by another"):
        ours(tmp_path, other)


def test_a_tied_weight_that_is_trained_stays_refused(tmp_path: Path) -> None:
    trained(tmp_path, llama(tied=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(KindError, match="ensure_weight_tying"):
        ours(tmp_path, llama(tied=True))


def test_fields_of_a_newer_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = trained(tmp_path, llama())
    edit(tmp_path, qalora_group_size=16, velora_config={"rank": 2}, megatron_core="megatron.core")
    torch.testing.assert_close(ours(tmp_path, llama()), want)
    edit(tmp_path, brand_new=3)
    with pytest.raises(KindError, match="brand_new=3"):  # this PEFT has no such field: it computes something else
        ours(tmp_path, llama())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.warns(BaseWarning, match="brand_new"):
        torch.testing.assert_close(ours(tmp_path, llama()), want)
    edit(tmp_path, alora_invocation_tokens=[5, 6])
    with pytest.raises(KindError, match="alora_invocation_tokens"), pytest.warns(BaseWarning):
        ours(tmp_path, llama())
