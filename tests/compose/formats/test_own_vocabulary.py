"""Adapters whose vocabulary was resized for them: the model's own loss, tables that several modules share, exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as T
from click.testing import CliRunner

import compose
from compose.errors import KindError
from hub.cli import main

peft = pytest.importorskip("peft")
NEW = torch.tensor([[3, 97, 5, 99, 11, 98]])  # tokens that the base does not have among them
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
FAMILIES = {
    "q_proj": lambda: T.LlamaForCausalLM(T.LlamaConfig(vocab_size=96, **WIDTHS)),
    "v_proj": lambda: T.MixtralForCausalLM(
        T.MixtralConfig(vocab_size=96, **WIDTHS, num_key_value_heads=2, num_local_experts=2, output_router_logits=True)
    ),
    "c_attn": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2)),
    "q": lambda: T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "query": lambda: T.BertForMaskedLM(T.BertConfig(vocab_size=96, **WIDTHS)),
    "k_proj": lambda: T.BartForConditionalGeneration(T.BartConfig(vocab_size=96, **BART, decoder_start_token_id=2)),
}


def base(target: str, rows: int = 96) -> T.PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[target]().eval()
    if rows != 96:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def adapted(directory: Path, target: str) -> torch.nn.Module:
    theirs = peft.get_peft_model(base(target, 100), peft.LoraConfig(r=2, target_modules=[target])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(directory, save_embedding_layers=True)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("target", ["q_proj", "v_proj", "c_attn", "q"])
def test_the_model_s_loss_counts_the_adapter_s_tokens(target: str, tmp_path: Path) -> None:
    want = adapted(tmp_path, target)(input_ids=NEW, labels=NEW)
    model = base(target)
    bare = model(input_ids=NEW % 96, labels=NEW % 96).loss
    compose.attach(model, "a", tmp_path)
    compose.activate(model, "a")
    given = model(input_ids=NEW, labels=NEW)
    torch.testing.assert_close(given.logits, want.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.loss, want.loss, atol=1e-5, rtol=1e-5)
    compose.activate(model, None)
    assert torch.equal(model(input_ids=NEW % 96, labels=NEW % 96).loss, bare)
    assert "_loss_function" not in vars(model)


def test_a_loss_inside_a_forward_is_refused(tmp_path: Path) -> None:
    theirs, model = adapted(tmp_path, "query"), base("query")
    compose.attach(model, "a", tmp_path)
    compose.activate(model, "a")
    torch.testing.assert_close(model(input_ids=NEW).logits, theirs(input_ids=NEW).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(KindError, match="adapter 'a' has a vocabulary of its own, of 100 tokens, and BertForMaskedLM"):
        model(input_ids=NEW, labels=NEW)


def test_what_else_has_the_size_of_the_vocabulary_is_named(tmp_path: Path) -> None:
    adapted(tmp_path, "k_proj")
    with pytest.raises(KindError, match="final_logits_bias, of the base's 96 tokens") as told:
        compose.attach(base("k_proj"), "a", tmp_path)
    assert "resize_token_embeddings(100)" in str(told.value.hint)


def test_peft_reads_the_export_on_a_base_of_that_size_as_it_says(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    base("q_proj").save_pretrained(tmp_path / "base")
    want = adapted(tmp_path / "a", "q_proj")
    for words in (
        ("import", str(tmp_path / "a"), "--name", "x/a", "--version", "1.0", "--base", str(tmp_path / "base")),
        ("export", "x/a", "--to", str(tmp_path / "out"), "--format", "peft", "--base", str(tmp_path / "base")),
    ):
        done = CliRunner().invoke(main, [*words])
        assert done.exit_code == 0, done.output
    assert "model.resize_token_embeddings(100) before PeftModel.from_pretrained" in done.output
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base("q_proj"), tmp_path / "out")
    again = peft.PeftModel.from_pretrained(base("q_proj", 100), tmp_path / "out").eval()
    torch.testing.assert_close(again(input_ids=NEW).logits, want(input_ids=NEW).logits, atol=1e-5, rtol=1e-5)
