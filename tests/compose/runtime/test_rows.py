"""A row gets its own adapter in models that lay out their rows in their own way, or the composition is refused by name.

Tiny random models with the options that make a family what it is; as many tokens as rows, so that no size tells which
dimension is which.
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from compose.errors import KindError, SiteError
from compose.kind.registry import get_kind, make_config
from compose.runtime.model_runtime import activate, route, runtime
from compose.runtime.row_trials import RowTrials

ROWS = ["a", "b", None]
_IDS = {"vocab_size": 61, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_BLOCKS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN = {**_IDS, **_BLOCKS, "max_position_embeddings": 64}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 4}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_STACKS = {f"{s}_{w}": n for s in ("encoder", "decoder") for w, n in (("attention_heads", 4), ("ffn_dim", 24))}
_BART = {**_IDS, **_STACKS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 2}
_T5 = {**_IDS, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 4}
_SEEN = {**_BLOCKS, "image_size": 16, "patch_size": 4}
_WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
_SOUND = {**_BLOCKS, "conv_dim": [8, 8], "conv_kernel": [8, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2}
_SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
_DEBERTA = {**_PLAIN, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
_DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "position_biased_input": False}

APART = {
    "xlnet": ("XLNetConfig", "CausalLM", {"vocab_size": 61, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}),
    "longformer": ("LongformerConfig", "MaskedLM", {**_PLAIN, "attention_window": 4}),
    "led": ("LEDConfig", "Seq2SeqLM", {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 64}),
    "fsmt": (
        "FSMTConfig",
        "Seq2SeqLM",
        {**_BART, "src_vocab_size": 61, "tgt_vocab_size": 61, "langs": ["en", "de"], "max_position_embeddings": 64},
    ),
    "big_bird": ("BigBirdConfig", "MaskedLM", {**_PLAIN, "block_size": 2, "num_random_blocks": 1}),
    "reformer": (
        "ReformerConfig",
        "MaskedLM",
        {**_IDS, "attention_head_size": 4, "hidden_size": 16, "num_attention_heads": 4, "feed_forward_size": 24}
        | {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 8], "attn_layers": ["local", "lsh"], "num_buckets": 4}
        | {"is_decoder": False, "hash_seed": 0},
    ),
    "prophetnet": (
        "ProphetNetConfig",
        "Seq2SeqLM",
        {**_IDS, "hidden_size": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_encoder_layers": 2}
        | {"num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
        | {"max_position_embeddings": 64, "decoder_start_token_id": 0},
    ),
    "longt5": ("LongT5Config", "Seq2SeqLM", {**_T5, "decoder_start_token_id": 1, "local_radius": 2}),
    "opt": ("OPTConfig", "CausalLM", {**_PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mixtral": ("MixtralConfig", "CausalLM", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "CausalLM", {**_EXPERTS, "num_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", "CausalLM", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8}),
    "phimoe": ("PhimoeConfig", "CausalLM", {**_EXPERTS, "num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", "CausalLM", {**_EXPERTS, "num_local_experts": 4, "sliding_window": 4}),
    "deberta": ("DebertaConfig", "MaskedLM", _PLAIN),
    "vit": ("ViTConfig", "ImageClassification", _SEEN),
    "swin": ("SwinConfig", "ImageClassification", _WINDOWS),
    "convnext": (
        "ConvNextConfig",
        "ImageClassification",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_scale_init_value": 1.0},
    ),
    "segformer": (
        "SegformerConfig",
        "SemanticSegmentation",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
        | {"decoder_hidden_size": 8, "image_size": 32},
    ),
    "wav2vec2": ("Wav2Vec2Config", "CTC", {**_SOUND, "vocab_size": 61}),
    "hubert": ("HubertConfig", "CTC", {**_SOUND, "vocab_size": 61}),
    "whisper": (
        "WhisperConfig",
        "SpeechSeq2Seq",
        {
            **_BART,
            "num_mel_bins": 4,
            "max_source_positions": 8,
            "max_target_positions": 32,
            "decoder_start_token_id": 0,
        },
    ),
}
REFUSED = {  # what the message says
    "deberta-v2": ("DebertaV2Config", "MaskedLM", {**_DEBERTA, "share_att_key": True}, "query_proj (and 3 more)"),
    "deberta-v2-own": ("DebertaV2Config", "MaskedLM", {**_DEBERTA, "share_att_key": False}, "one input for all rows"),
    "deberta-v1": ("DebertaConfig", "MaskedLM", _DEBERTA, "pos_proj"),
    "switch_transformers": (
        "SwitchTransformersConfig",
        "Seq2SeqLM",
        {**_T5, "num_experts": 4, "decoder_start_token_id": 1, "num_sparse_encoder_layers": 1},
        "takes the tokens of all rows together",
    ),
    "nllb-moe": (
        "NllbMoeConfig",
        "Seq2SeqLM",
        {**_BART, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "max_position_embeddings": 64},
        "takes the tokens of all rows together",
    ),
}


def build(name, head, fields):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def put(model, *names, kind="lora", **options):
    """Resident adapters that do something wherever they can."""
    cls, home = get_kind(kind), runtime(model)
    for seed, name in enumerate(names):
        chosen = {"target_modules": "all-linear", "r": 1, **options} if kind in ("lora", "dora") else options
        adapter = cls(make_config(cls, chosen), home.sites, model, name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        home.add(name, adapter.freeze())
    return model


def inputs(model, rows=3, length=3):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 60, (rows, length), generator=generator)
    main = model.main_input_name
    batch = {"input_ids": ids} if main == "input_ids" else {}
    if main == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        batch[main] = torch.randn(rows, 3, size, size, generator=generator)
    if main == "input_features":
        batch[main] = torch.randn(rows, 4, 16, generator=generator)
    if main == "input_values":
        batch[main] = torch.randn(rows, 200, generator=generator)
    return {**batch, "decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else batch


def row(batch, i):
    return {name: value[i : i + 1] for name, value in batch.items()}


@torch.no_grad()
def logits(model, expr, batch):
    activate(model, expr)
    return model(**batch).logits


def agree(model, batch, rows=ROWS):
    together = logits(model, rows, batch)
    alone = torch.cat([logits(model, expr, row(batch, i)) for i, expr in enumerate(rows)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    bare = logits(model, None, batch)
    assert not torch.allclose(bare[0], together[0], atol=1e-3)
    assert not torch.allclose(bare[1], together[1], atol=1e-3)


@pytest.mark.parametrize("length", [3, 4])  # as many tokens as rows, and not
@pytest.mark.parametrize("family", APART)
def test_a_row_is_the_row_alone(family, length):
    model = put(build(*APART[family]), "a", "b")
    agree(model, inputs(model, length=length))


@pytest.mark.parametrize("kind", ["dora", "ia3", "bias", "bottleneck", "dense"])
@pytest.mark.parametrize("family", ["xlnet", "fsmt", "led", "big_bird", "swin", "convnext", "segformer", "opt"])
def test_other_kinds_too(family, kind):
    model = build(*APART[family])
    try:
        put(model, "a", "b", kind=kind)
    except (KindError, SiteError):
        return  # this kind cannot work here at all, and says so
    agree(model, inputs(model))


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("family", ["xlnet", "fsmt", "opt", "prophetnet", "reformer", "phimoe", "longt5"])
def test_prompts_of_rows(family, length):
    model = build(*APART[family])
    put(model, "a", kind="prompt", num_virtual_tokens=3)
    put(model, "b", kind="prompt", num_virtual_tokens=2)
    agree(model, inputs(model, length=length))


@pytest.mark.parametrize("family", ["opt", "longt5", "switch_transformers", "phimoe", "vit", "wav2vec2"])
def test_prefixes_of_rows(family):
    model = build(*(APART | {name: what[:3] for name, what in REFUSED.items()})[family])
    put(model, "a", kind="prefix", num_virtual_tokens=3)
    put(model, "b", kind="prefix", num_virtual_tokens=2)
    agree(model, inputs(model))


def test_a_prefix_of_each_row_where_positions_are_laid_out_otherwise():
    model = build("PegasusXConfig", "Seq2SeqLM", {**_BART, "max_position_embeddings": 64, "num_global_tokens": 4})
    put(model, "a", kind="prefix", num_virtual_tokens=3)
    put(model, "b", kind="prefix", num_virtual_tokens=2)
    with pytest.raises(KindError, match="embed_positions numbers tokens in another order"):
        activate(model, ROWS)


@pytest.mark.parametrize("family", ["xlnet", "longformer", "fsmt", "prophetnet", "reformer", "swin"])
@pytest.mark.parametrize("kind", ["ladder", "attention_fusion"])
def test_side_networks_need_states_of_rows_and_tokens(family, kind):
    model = build(*APART[family])
    put(model, "a", kind=kind)
    with pytest.raises(KindError, match="a side network cannot act in this"):
        activate(model, "a")


def test_side_networks_need_states_that_are_pooled_where_they_can_see():
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**_PLAIN, "eos_token_id": 2})).eval()
    put(model, "a", kind="ladder")
    activate(model, "a")
    with torch.no_grad(), pytest.raises(KindError, match="pools its final states itself"):
        model(input_ids=torch.arange(4, 13).reshape(3, 3))


UNEVEN = {  # no mask, places counted from the first one on, a row's last place looked at
    "fnet": ("FNetConfig", "MaskedLM", {**_PLAIN, "tpu_short_seq_length": 64}),
    "ctrl": ("CTRLConfig", "CausalLM", {**_IDS, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "openai-gpt": ("OpenAIGPTConfig", "CausalLM", {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bart": ("BartConfig", "CausalLM", {**_BART, "is_encoder_decoder": False, "max_position_embeddings": 64}),
    "convbert": ("ConvBertConfig", "MaskedLM", {**_PLAIN, "embedding_size": 16}),
}


@pytest.mark.parametrize("family", UNEVEN)
def test_prompts_of_different_lengths_where_what_fills_up_is_read(family):
    model = build(*UNEVEN[family])
    put(model, "a", kind="prompt", num_virtual_tokens=3)
    put(model, "b", kind="prompt", num_virtual_tokens=2)
    put(model, "c", kind="prompt", num_virtual_tokens=3)
    with pytest.raises(KindError, match="prompts of unlike lengths"):
        activate(model, ["a", "b", None])
    agree(model, inputs(model), ["a", "c", "a"])  # of one length


@pytest.mark.parametrize(("family", "length"), [("longformer", 5), ("led", 5), ("big_bird", 100)])
def test_a_prompt_before_a_text_that_the_model_pads_is_refused(family, length):
    model = build(*APART[family][:2], {**APART[family][2], "max_position_embeddings": 200})
    put(model, "a", kind="prompt", num_virtual_tokens=3)
    with torch.no_grad(), pytest.raises(KindError, match="a prompt"):
        activate(model, "a")
        model(**inputs(model, length=length))


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_told_apart_is_refused_by_name(family):
    *what, told = REFUSED[family]
    model = put(build(*what), "a", "b")
    batch = inputs(model)
    before = logits(model, "a", batch)
    with pytest.raises(KindError, match=re.escape(told)) as refused:
        activate(model, ROWS)
    assert "activate one composition for the whole batch" in refused.value.hint
    torch.testing.assert_close(model(**batch).logits, before)  # what was active is
    shared = logits(model, ["a", "a", "a"], batch)  # rows that do not differ need not be told apart
    torch.testing.assert_close(shared, before)


def test_the_hint_names_sites_that_work():
    model = put(build(*REFUSED["deberta-v2"][:3]), "a", "b")
    with pytest.raises(KindError) as refused:
        activate(model, ROWS)
    sites = re.search(r"at\(a, (sites=\[.*\])\)", refused.value.hint)[1]
    agree(model, inputs(model), [f"at(a, {sites})", f"at(b, {sites})", None])


def llava(images):
    """A text with so many images in each row, and the vision tower's pixels."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config={**_GROUPED, "model_type": "llama"},
        vision_config={**_SEEN, "projection_dim": 16, "model_type": "clip_vision_model"},
        image_token_index=60,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(4, 60, (len(images), 40))
    for i, n in enumerate(images):
        ids[i, 2 : 2 + 16 * n] = 60
    return model, {"input_ids": ids, "pixel_values": torch.randn(sum(images), 3, 16, 16)}


@pytest.mark.parametrize("images", [(1, 0, 2), (1, 1, 1)])  # as many images as rows, whoever's they are
def test_images_are_not_rows(images):
    model, batch = llava(images)
    put(model, "a", "b")
    with torch.no_grad():
        activate(model, ROWS)
        with pytest.raises(KindError, match=r"vision_tower.* which gets an input that is not the text's"):
            model(**batch)
        agree(model, {"input_ids": torch.arange(4, 13).reshape(3, 3)})  # without images no image is asked for


@pytest.mark.parametrize("images", [(1, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix", "ladder", "attention_fusion"])
def test_the_text_of_a_model_with_images(kind, images):
    model, batch = llava(images)
    if kind == "lora":
        put(model, "l", "m")
        rows = [f"at({name}, sites=['language_model'])" for name in "lm"] + [None]
    else:
        lengths = ({"num_virtual_tokens": 3}, {"num_virtual_tokens": 2}) if kind in ("prompt", "prefix") else ({}, {})
        for name, options in zip("lm", lengths, strict=True):
            put(model, name, kind=kind, **options)
        rows = ["l", "m", None]
    together = logits(model, rows, batch)
    for i, (expr, n) in enumerate(zip(rows, images, strict=True)):
        own = batch["pixel_values"][sum(images[:i]) :][:n]
        alone = {"input_ids": batch["input_ids"][i : i + 1], **({"pixel_values": own} if n else {})}
        torch.testing.assert_close(together[i : i + 1], logits(model, expr, alone), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], logits(model, None, batch)[0], atol=1e-3)


def test_the_hint_of_a_model_with_images_works():
    model, batch = llava((1, 0, 2))
    put(model, "a", "b")
    activate(model, ROWS)
    with torch.no_grad(), pytest.raises(KindError) as refused:
        model(**batch)
    assert "at(a, sites=['language_model'])" in refused.value.hint


@pytest.mark.parametrize("pictures", [2, 3])
def test_of_a_text_and_a_picture_the_text_is_the_row(pictures):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**_PLAIN, "eos_token_id": 2}, vision_config=_SEEN, projection_dim=16, _attn_implementation="eager"
    )
    model = put(transformers.CLIPModel(config).eval(), "a", "b")
    batch = {"input_ids": torch.arange(4, 13).reshape(3, 3), "pixel_values": torch.randn(pictures, 3, 16, 16)}
    activate(model, ROWS)
    with torch.no_grad(), pytest.raises(KindError, match="vision_model"):
        model(**batch)


def test_weights_per_token_where_tokens_come_first():
    model = put(build(*APART["xlnet"]), "a", "b")
    batch, weight = inputs(model), torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.25, 1.0, 1.0]])
    activate(model, "a", weights={"a": weight})
    with torch.no_grad():
        together = model(**batch).logits
        for i in range(3):
            activate(model, "a", weights={"a": weight[i : i + 1]})
            torch.testing.assert_close(model(**row(batch, i)).logits, together[i : i + 1], rtol=1e-3, atol=1e-4)


def test_weights_per_token_need_the_tokens_of_a_row_in_order():
    model = put(build(*APART["swin"]), "a")
    activate(model, "a", weights={"a": torch.ones(3, 16)})  # a window has 16 places, too
    with torch.no_grad(), pytest.raises(KindError, match="weights were given for 16 tokens"):
        model(**inputs(model))


class Halves:
    """Row 0 is all of the first expert's, the others the second's."""

    def __call__(self, path, x):
        weights = torch.zeros(len(x), 1, 2)
        weights[0, :, 0], weights[1:, :, 1] = 1.0, 1.0
        return weights


@pytest.mark.parametrize("family", ["xlnet", "opt"])
def test_a_gate_gets_rows_first(family):
    model = put(build(*APART[family]), "a", "b")
    batch = inputs(model)
    alone = torch.cat([logits(model, expr, row(batch, i)) for i, expr in enumerate("abb")])
    route(model, ["a", "b"], Halves())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["fsmt", "led", "whisper", "opt", "qwen3_moe"])
def test_generated_texts_of_a_batch(family):
    model = put(build(*APART[family]), "a", "b")
    batch = {name: value for name, value in inputs(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    activate(model, ROWS)
    together = model.generate(**batch, **options)
    for i, expr in enumerate(ROWS):
        activate(model, expr)
        assert model.generate(**row(batch, i), **options).tolist() == together[2 * i : 2 * i + 2].tolist()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["xlnet", "swin", "fsmt"])
def test_gradients_come_from_the_rows_that_use_an_adapter(family, checkpointed):
    model = put(build(*APART[family]), "a", "b")
    batch = inputs(model)
    adapters = [runtime(model).adapter(name).unfreeze() for name in "ab"]
    if checkpointed:
        if not model.supports_gradient_checkpointing:
            pytest.skip("has no checkpoints")
        model.gradient_checkpointing_enable()

    def gradients(expr, given):
        activate(model, expr)
        model.zero_grad()
        model(**given).logits.square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for a in adapters for p in a.parameters()]

    together = gradients(["a", "b", None], batch)
    for i, expr in enumerate("ab"):
        alone = gradients(expr, row(batch, i))
        half = len(alone) // 2
        for mine, same in zip(alone[i * half :][:half], together[i * half :][:half], strict=True):
            torch.testing.assert_close(mine, same, rtol=2e-3, atol=1e-4)


# -- the trial calls ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How many trial calls were made."""
    made = []
    own = RowTrials._watch
    monkeypatch.setattr(RowTrials, "_watch", lambda *given: made.append(1) or own(*given))
    return made


def test_a_model_is_tried_once(calls, tiny):
    model = tiny.model("llama")
    tiny.adapter(model, "lora", "a").freeze()
    tiny.adapter(model, "ia3", "b").freeze()
    batch = tiny.batch("llama", tiny.rows(5, 5))
    activate(model, "a + b")
    tiny.logits(model, batch)
    assert not calls  # nothing to be told apart
    for rows in (["a", "b"], ["b", None], ["a + b", "a"], "a"):
        activate(model, rows)
        tiny.logits(model, batch)
    assert len(calls) == 5


def test_a_trial_leaves_the_model_as_it_was(calls):
    model = build(*APART["big_bird"][:2], {**APART["big_bird"][2], "max_position_embeddings": 200})
    model.train()
    long = {"input_ids": torch.randint(4, 60, (3, 120))}  # short texts switch the attention over, for good
    put(model, "a", "b")

    def state():
        hooks = {p: [len(v) for k, v in m.__dict__.items() if k.endswith("_hooks")] for p, m in model.named_modules()}
        plain = {p: sorted(m.__dict__) for p, m in model.named_modules() if "moduloom" not in p}
        return hooks, plain, [m.training for m in model.modules()], model.bert.attention_type

    activate(model, "a")
    with torch.no_grad():
        model(**long)
    before, random = state(), torch.get_rng_state()
    activate(model, ROWS)
    assert len(calls) == 5
    assert before == state()
    assert torch.equal(random, torch.get_rng_state())
    assert model.bert.attention_type == "block_sparse"


def test_a_trial_before_the_first_call_of_all(calls):
    """What transformers puts on a model at its first call is put on once."""
    model = put(build(*APART["segformer"]), "a", "b")
    activate(model, ROWS)
    assert len(calls) == 5
    with torch.no_grad():
        states = model(**inputs(model), output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_encoder_blocks


def test_sounds_are_tried_in_the_form_of_the_first_call(calls):
    model = put(build(*APART["wav2vec2"]), "a", "b")
    activate(model, ROWS)
    assert not calls  # no length is known
    for _ in range(2):
        with torch.no_grad():
            model(**inputs(model))
    assert len(calls) == 5


def test_a_model_that_cannot_be_tried_is_refused(tiny, monkeypatch):
    model = tiny.model("llama")
    for name in "ab":
        tiny.adapter(model, "lora", name).freeze()

    def broken(*given, **options):
        raise ValueError("no such call")

    batch = tiny.batch("llama", tiny.rows(5, 5))
    monkeypatch.setattr(type(model), "forward", broken)
    activate(model, ["a", "b"])
    with pytest.raises(KindError, match=r"a trial call of LlamaForCausalLM failed \(no such call\)"):
        model(**batch)


def test_a_module_that_takes_more_than_its_rows(tiny):
    """The sizes of each call are compared with those of the trial."""
    model = tiny.model("opt")
    for name in "ab":
        tiny.adapter(model, "lora", name, target_modules="all-linear").freeze()
    activate(model, ["a", "b"])
    tiny.logits(model, tiny.batch("opt", tiny.rows(5, 5)))
    with pytest.raises(KindError, match=r"6 entries come to .* for 2 rows"):
        model.get_submodule("model.decoder.layers.0.fc1")(torch.zeros(6, 32))
