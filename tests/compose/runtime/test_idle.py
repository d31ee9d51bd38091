"""An adapter at a layer that is never called does not do nothing in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as T
from torch import nn

import compose
from compose.errors import IdleWarning, SiteBypassed
from compose.runtime.model_runtime import runtime

IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
STATES = {"state_size": 4, "time_step_rank": 4}


def siglip():
    config = T.SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, image_size=16, patch_size=8, **HEADS)
    return T.SiglipVisionModel(config)


def bridgetower():
    text = {**TEXT, **HEADS}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    width = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return T.BridgeTowerModel(
        T.BridgeTowerConfig(**width, text_config={**text, "hidden_size": 64}, vision_config=vision)
    )


def jamba():
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    sizes = {"num_key_value_heads": 2, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
    return T.JambaForCausalLM(T.JambaConfig(**{**TEXT, "num_hidden_layers": 4}, **HEADS, **layers, **sizes))


def mobilebert():
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    return T.MobileBertForMaskedLM(T.MobileBertConfig(**TEXT, **HEADS, **sizes))


TEXTS, IMAGES = {"input_ids": IDS}, {"pixel_values": torch.randn(2, 3, 16, 16)}
PASSED = {
    "siglip": (siglip, IMAGES, "head.attention.out_proj"),
    "bridgetower": (
        bridgetower,
        {**TEXTS, **IMAGES, "pixel_mask": torch.ones(2, 16, 16, dtype=torch.long)},
        "attn.out_proj",
    ),
    "mamba": (lambda: T.MambaForCausalLM(T.MambaConfig(**TEXT, **STATES)), TEXTS, "dt_proj"),
    "falcon_mamba": (lambda: T.FalconMambaForCausalLM(T.FalconMambaConfig(**TEXT, **STATES)), TEXTS, "dt_proj"),
    "jamba": (jamba, TEXTS, "dt_proj"),
    "mobilebert": (mobilebert, TEXTS, "decoder"),
}


def trained(model, name="a", **options):
    adapter = compose.create(model, "lora", {"r": 2, **options}, name=name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return adapter.freeze()


@pytest.mark.parametrize("name", PASSED)
def test_a_layer_whose_weight_is_read_elsewhere(name):
    make, batch, target = PASSED[name]
    model = make().eval()
    adapter = trained(model, target_modules=(target,))
    compose.activate(model, "a")
    for _ in range(2):  # each call says so
        with pytest.raises(SiteBypassed) as caught:
            model(**batch)
        assert adapter.paths[0] in str(caught.value)
        assert "'a'" in str(caught.value)
        assert target.rpartition(".")[2] in caught.value.hint
    assert not any(type(m._parameters) is not dict for m in model.modules()), "the watch is taken off again"
    assert not any(m._forward_pre_hooks for m in model.modules())
    compose.activate(model, "0 * a")
    model(**batch)
    compose.eject(model)
    model(**batch)


@pytest.mark.parametrize("name", [n for n in PASSED if n not in ("siglip", "mobilebert")])
def test_all_linear_leaves_such_layers_out(name):
    make, batch, target = PASSED[name]
    model = make().train()
    adapter = compose.create(model, "lora", {"r": 2, "target_modules": "all-linear"}, name="a")
    assert not any(path.endswith(target) for path in adapter.paths)
    compose.activate(model, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdleWarning)
        out = model(**batch)
    (out.logits if hasattr(out, "logits") else out.pooler_output).square().mean().backward()
    assert all(p.grad is not None for n, p in adapter.named_parameters() if n.endswith("B"))


def test_what_is_zero_there_is_let_through_unless_it_is_to_learn():
    """As an adapter that PEFT has trained on all linear layers: where no gradient came, B has stayed zero."""
    make, batch, target = PASSED["mamba"]
    model = make().eval()
    adapter = compose.create(model, "lora", {"r": 2, "target_modules": (target, "in_proj")}, name="a")
    compose.activate(model, "a")
    with pytest.raises(SiteBypassed):
        model(**batch)
    adapter.freeze()
    model(**batch)


class Gated(nn.Module):
    """A block that calls its second layer for some inputs only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.one(x) + (self.two(x) if x.mean() > 100 else 0)


def test_a_layer_that_stays_out_is_a_warning_once():
    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT, **HEADS)).eval()
    model.model.layers[0].mlp = Gated()
    trained(model, target_modules=("one", "two"))
    compose.activate(model, "a")
    with pytest.warns(IdleWarning, match=r"layers\.0\.mlp\.two did not run.*adapter 'a'"):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
        compose.activate(model, ["a", None])
        model(IDS)


def expected_quiet():
    tiny = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    experts = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 16}
    return {
        "experts": lambda: T.SwitchTransformersForConditionalGeneration(
            T.SwitchTransformersConfig(vocab_size=96, **tiny, **experts)
        ),
        "encoder-decoder": lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=96, **tiny)),
        "causal": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT, **HEADS, num_key_value_heads=2)),
    }


@pytest.mark.parametrize("name", expected_quiet())
def test_what_may_stay_out_is_not_spoken_of(name):
    """Experts that no token chose; the decoder while the encoder alone is called; cross-attention with its cache."""
    torch.manual_seed(0)
    model = expected_quiet()[name]().eval()
    trained(model, target_modules="all-linear")
    compose.activate(model, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdleWarning)
        if name == "experts":
            model(input_ids=IDS[:, :2], decoder_input_ids=IDS[:, :2])
        else:
            model.generate(input_ids=IDS[:, :3], max_new_tokens=3, min_new_tokens=3)
        model.base_model(input_ids=IDS, **({} if name == "causal" else {"decoder_input_ids": IDS}))


def test_a_place_that_ran_is_not_watched_any_more():
    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT, **HEADS)).eval()
    trained(model)
    compose.activate(model, "a")
    hooks = []
    watched = runtime(model)._calls.watch
    model.model.layers[0].self_attn.register_forward_hook(lambda m, *_: hooks.append(len(m._forward_pre_hooks)))
    model(IDS), model(IDS)
    trained(model, "b", target_modules=("q_proj",))
    compose.activate(model, "a + b")
    model(IDS)
    assert hooks[0] > 0
    assert hooks[1:] == [0, 0]
    model.train()  # where a model may take another way
    model(IDS)
    assert hooks[3] > 0
    assert watched._known[True] == watched._known[False]


def test_a_tap_that_has_not_run_is_named():
    """A parallel adapter reads what enters the feed-forward block, which this block computes afterwards."""

    class Backwards(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

        def forward(self, x):
            y = self.down_proj(x.repeat(1, 1, 2)[..., :48])
            return y + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT, **HEADS)).eval()
    model.model.layers[0].mlp = Backwards(model.model.layers[0].mlp)
    compose.create(model, "bottleneck", {"style": "parallel"}, name="a").freeze()
    compose.activate(model, "a")
    with pytest.raises(compose.errors.KindError, match="has not run in this call"):
        model(IDS)


def test_a_prefix_where_attention_goes_another_way():
    """The file of the class knows transformers' attention interface; this layer's forward does not go through it."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT, **HEADS)).eval()
    compose.create(model, "prefix", {"num_virtual_tokens": 2}, name="a").freeze()
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **_: (layer.o_proj(layer.v_proj(hidden_states)), None)
    compose.activate(model, "a")
    with pytest.raises(SiteBypassed, match=r"layers\.1\.self_attn ran without transformers' attention interface"):
        model(IDS)


def test_a_prompt_that_does_not_go_in():
    """The embedding is looked up in a table that is not the one the model names."""
    model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4)).eval()
    compose.create(model, "prompt", {"num_virtual_tokens": 2}, name="a").freeze()
    compose.activate(model, "a")
    other = nn.Embedding(96, 32)
    model.transformer.wte.forward = lambda ids: other(ids)
    with pytest.raises(compose.errors.KindError, match="the prompt did not go in"):
        model(IDS)
