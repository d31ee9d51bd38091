"""What works where: the other families of the table, and who refuses. A change of either record is noticed here."""

from __future__ import annotations

import pytest
import torch
import transformers

from compose.base.families import FAMILIES
from compose.errors import KindError, SiteError
from compose.kind.registry import kinds
from compose.runtime.model_runtime import activate, eject

_IDS = {"vocab_size": 53, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN = {**_IDS, **_BLOCKS, "max_position_embeddings": 48}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {**_GROUPED, "sliding_window": 4}
_BART = {**_IDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 48}
_BART |= {
    f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 48))
}
_MT5 = {**_IDS, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8}

OTHERS = {
    "mistral": ("MistralConfig", "CausalLM", _WINDOW),
    "qwen3": ("Qwen3Config", "CausalLM", _GROUPED),
    "gemma": ("GemmaConfig", "CausalLM", _GROUPED),
    "gemma2": ("Gemma2Config", "CausalLM", _WINDOW),
    "gemma3_text": ("Gemma3TextConfig", "CausalLM", _WINDOW),
    "phi": ("PhiConfig", "CausalLM", {**_PLAIN, "num_key_value_heads": 2}),
    "phi3": ("Phi3Config", "CausalLM", {**_PLAIN, "num_key_value_heads": 2}),
    "bloom": ("BloomConfig", "CausalLM", {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "electra": ("ElectraConfig", "MaskedLM", {**_PLAIN, "embedding_size": 16}),
    "xlm-roberta": ("XLMRobertaConfig", "MaskedLM", _PLAIN),
    "deberta-v2": ("DebertaV2Config", "MaskedLM", _PLAIN),
    "albert": ("AlbertConfig", "MaskedLM", {**_PLAIN, "embedding_size": 16}),
    "distilbert": ("DistilBertConfig", "MaskedLM", {**_IDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "modernbert": (
        "ModernBertConfig",
        "MaskedLM",
        {**_PLAIN, "local_attention": 4, "cls_token_id": 0, "sep_token_id": 2},
    ),
    "bart": ("BartConfig", "Seq2SeqLM", _BART),
    "mt5": ("MT5Config", "Seq2SeqLM", {**_MT5, "decoder_start_token_id": 1}),
}
# Attention outside transformers' interface, or positions that the module makes up itself: no place for a prefix.
REFUSED = {("prefix", "bloom"), ("prefix", "deberta-v2"), ("prefix", "bart")}


@pytest.fixture(scope="module")
def build():
    def make(family):
        name, head, fields = OTHERS[family]
        torch.manual_seed(0)
        config = getattr(transformers, name)(**fields)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return model

    return make


def test_the_record_names_known_families():
    assert set(OTHERS) < set(FAMILIES)
    known = set(kinds())
    assert {kind for kind, _ in REFUSED} <= known


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_families(tiny, build, close, kind, other):
    model = build(other)
    if (kind, other) in REFUSED:
        with pytest.raises((KindError, SiteError), match=rf"(?s)(?=.*{kind})(?=.*{other})"):
            tiny.adapter(model, kind, "a")
        assert all(type(m).__name__ != "Slot" for m in model.modules())
        return
    batch = {"input_ids": torch.stack(tiny.rows(6, 6, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.stack(tiny.rows(4, 4, 4, seed=2))

    def logits(i=None):
        with torch.no_grad():
            return list(model(**(batch if i is None else {k: v[i : i + 1] for k, v in batch.items()})).logits)

    bare = logits()
    fresh = tiny.adapter(model, kind, "a", noise=0.0)
    if fresh.identity_at_init:
        activate(model, "a")
        assert all(torch.equal(a, b) for a, b in zip(logits(), bare, strict=True))
    tiny.adapter(model, kind, "a").freeze()
    tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    alone = []
    for i, expr in enumerate(["a", None, "b"]):
        activate(model, expr)
        alone += logits(i)
    assert (alone[0] - bare[0]).abs().max() > 0.05, "it has no effect"
    activate(model, ["a", None, "b"])
    close(logits(), alone)
    eject(model)
    assert all(torch.equal(a, b) for a, b in zip(logits(), bare, strict=True))


def test_refusals_on_the_eight_families(tiny, refusals):
    """The grid leaves these out; here they must be refused, by name."""
    for kind, family in refusals:
        with pytest.raises((KindError, SiteError), match=rf"(?s)(?=.*{kind})(?=.*{family})"):
            tiny.adapter(tiny.model(family), kind, "a")
