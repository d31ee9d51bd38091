"""Side networks: no gradient in the backbone, its pooler is run anew, the uniform mean at first."""

from __future__ import annotations

import pytest
import torch
import transformers

import compose
from compose.errors import KindError
from compose.kinds.attention_fusion import fuse
from compose.runtime.model_runtime import activate, eject, runtime


@pytest.mark.parametrize("kind", ["ladder", "attention_fusion"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_backbone_has_no_graph(tiny, kind, family):
    model = tiny.model(family)
    tiny.adapter(model, kind, "a", noise=0.1)
    activate(model, "a")
    model.enable_input_require_grads()  # as gradient checkpointing asks for
    inside = []
    block = runtime(model).side._blocks[0].layer
    block.register_forward_hook(lambda m, a, out: inside.append(out if torch.is_tensor(out) else out[0]))
    loss = model(**tiny.batch(family, tiny.rows(5, 3))).logits.square().mean()
    assert not inside[0].requires_grad
    assert torch.is_grad_enabled()
    loss.backward()


def test_a_failed_call_leaves_gradients_on(tiny):
    model = tiny.model("llama")
    tiny.adapter(model, "ladder", "a")
    activate(model, "a")
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert torch.is_grad_enabled()
    assert model(**tiny.batch("llama", tiny.rows(4))).logits.requires_grad


def test_a_lora_beside_a_ladder_still_learns(tiny):
    model = tiny.model("llama")
    lora = tiny.adapter(model, "lora", "l")
    tiny.adapter(model, "ladder", "a")
    activate(model, "l >> a")
    model(**tiny.batch("llama", tiny.rows(4))).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in lora.parameters())


def test_fusion_starts_from_the_mean_of_all_layers(tiny):
    model = tiny.model("bert")
    batch = tiny.batch("bert", tiny.rows(5, 3))
    states = model.bert(**batch, output_hidden_states=True).hidden_states
    adapter = tiny.adapter(model, "attention_fusion", "a", noise=0.0)
    activate(model, "a")
    fused = model.bert(**batch).last_hidden_state
    torch.testing.assert_close(fused, torch.stack(states).mean(0))
    torch.testing.assert_close(fused, fuse(states, adapter.at("", "query")))  # from features that were kept


def test_the_pooler_reads_the_new_states(tiny):
    model = tiny.model("bert", task="classification")
    batch = tiny.batch("bert", tiny.rows(5, 3))
    tiny.adapter(model, "attention_fusion", "a").freeze()
    activate(model, "a")
    for out in (model.bert(**batch), model.bert(**batch, return_dict=False)):
        torch.testing.assert_close(out[1], model.bert.pooler(out[0]))
    eject(model)
    assert not model.bert._forward_hooks


def test_layers_choose_the_rungs(tiny, close):
    model = tiny.model("llama", num_hidden_layers=4)
    adapter = tiny.adapter(model, "ladder", "a", layers=[1, 3]).freeze()
    assert {key.split(".")[0] for key in adapter.state()} == {"in", "out", "1", "3"}
    activate(model, "a")
    assert all(torch.isfinite(y).all() for y in tiny.logits(model, tiny.batch("llama", tiny.rows(4))))


def test_branches_share_one_history(tiny, close):
    """A ladder in two rows' expressions is evaluated twice in a call, and its keys go into the cache once."""
    model = tiny.model("llama")
    tiny.adapter(model, "ladder", "a").freeze()
    tiny.adapter(model, "attention_fusion", "f").freeze()
    rows, exprs = tiny.rows(4, 4), ["a", "f >> a"]
    alone = []
    for row, expr in zip(rows, exprs, strict=True):
        activate(model, expr)
        alone += tiny.logits(model, tiny.batch("llama", [row]))
    activate(model, exprs)
    close(tiny.logits(model, tiny.batch("llama", rows)), alone)


def test_a_model_that_goes_past_its_final_states_is_told(tiny, monkeypatch):
    """What does nothing does not do so in silence."""
    model = tiny.model("llama")
    tiny.adapter(model, "ladder", "a").freeze()
    activate(model, "a")
    batch = tiny.batch("llama", tiny.rows(4))
    tiny.logits(model, batch)
    monkeypatch.setattr(
        type(model), "forward", lambda self, input_ids, **options: self.lm_head(input_ids[..., None] * torch.ones(32))
    )
    with pytest.raises(KindError, match="a side network did nothing"):
        model(**batch)


def test_a_mask_of_another_form_is_refused(tiny):
    model = tiny.model("llama")
    tiny.adapter(model, "ladder", "a").freeze()
    activate(model, "a")
    batch = tiny.batch("llama", tiny.rows(4))
    with pytest.raises(KindError, match=r"reads a mask of shape \(batch, length\)"):
        model(**{**batch, "attention_mask": {"full_attention": batch["attention_mask"]}})


@pytest.mark.parametrize("kind", ["ladder", "lora"])
def test_a_decoder_that_is_an_encoder_inside(kind):
    """EncoderDecoderModel holds its stacks as ``decoder.bert.encoder``."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    bert = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    model = transformers.EncoderDecoderModel(config=config).eval()
    adapter = compose.create(model, kind, name="a")
    assert {s.stack for s in runtime(model).sites} == {"encoder", "decoder"}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    ids = torch.arange(4, 10).reshape(2, 3)
    with torch.no_grad():
        bare = model(input_ids=ids, decoder_input_ids=ids).logits
        activate(model, "a")
        assert not torch.allclose(model(input_ids=ids, decoder_input_ids=ids).logits, bare, atol=1e-3)
