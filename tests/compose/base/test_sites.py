"""Where the named sites of a model are, how they are asked for, and what is said when there is none."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import compose
from compose.base.families import guess_role
from compose.base.sites import SiteMap
from compose.errors import KindError, SiteError
from compose.runtime.model_runtime import runtime

FAMILIES = ["llama", "qwen2", "gpt2", "bert", "roberta", "t5", "opt", "gpt_neox"]
SPLIT = {"attn.q", "attn.k", "attn.v", "attn.o"}
ROLES = {
    "llama": SPLIT | {"mlp.gate", "mlp.up", "mlp.down"},
    "qwen2": SPLIT | {"mlp.gate", "mlp.up", "mlp.down"},
    "gpt2": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "bert": SPLIT | {"mlp.up", "mlp.down"},
    "roberta": SPLIT | {"mlp.up", "mlp.down"},
    "t5": SPLIT | {"cross.q", "cross.k", "cross.v", "cross.o", "mlp.up", "mlp.down"},
    "opt": SPLIT | {"mlp.up", "mlp.down"},
    "gpt_neox": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
}


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_family(tiny, family, dtype):
    sites = SiteMap(tiny.model(family, dtype))
    assert {s.role for s in sites} == ROLES[family]
    assert {s.layer for s in sites} == {0, 1}
    assert {s.stack for s in sites} == ({"encoder", "decoder"} if family == "t5" else {""})
    plain = {s.path: (s.in_features, s.out_features) for s in SiteMap(tiny.model(family))}
    assert {s.path: (s.in_features, s.out_features) for s in sites} == plain
    assert len(sites.attention_modules()) == (4 if family == "t5" else 2)
    assert sites.embedding.endswith(
        {"gpt2": "wte", "bert": "word_embeddings", "roberta": "word_embeddings", "gpt_neox": "embed_in"}.get(
            family, "embed_tokens"
        )
    )


def test_shapes_are_input_then_output(tiny):
    llama = SiteMap(tiny.model("llama"))
    shapes = {s.role: (s.in_features, s.out_features) for s in llama if s.layer == 0}
    assert shapes["attn.k"] == (32, 16)  # grouped: two key-value heads of eight
    assert shapes["mlp.up"] == (32, 48)
    assert shapes["mlp.down"] == (48, 32)
    gpt2 = SiteMap(tiny.model("gpt2"))  # Conv1D keeps its weight transposed
    assert {s.role: (s.in_features, s.out_features) for s in gpt2 if s.layer == 0}["attn.qkv"] == (32, 96)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("attn.q", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("self_attn.q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("1.attn.q",), ["model.layers.1.self_attn.q_proj"]),
        (("model.layers.0.mlp.up_proj", "up_proj"), ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (("lm_head",), ["lm_head"]),
    ],
)
def test_asking_for_sites(tiny, wanted, expected):
    assert [s.path for s in SiteMap(tiny.model("llama")).select(wanted)] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_the_heads_out(tiny, family):
    model = tiny.model(family)
    inside = {
        n
        for n, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and any(p.isdigit() for p in n.split("."))
    }
    assert {s.path for s in SiteMap(model).select("all-linear")} == inside


def test_names_on_an_encoder_decoder(tiny):
    sites = SiteMap(tiny.model("t5"))
    assert [s.path for s in sites.select(("decoder.1.cross.k",))] == ["decoder.block.1.layer.1.EncDecAttention.k"]
    assert {s.stack for s in sites.select(("attn.q",))} == {"encoder", "decoder"}


def test_a_slot_does_not_hide_a_site(tiny):
    model = tiny.model("bert")
    before = list(SiteMap(model))
    tiny.adapter(model, "lora", "a", target_modules="all-linear")
    compose.activate(model, "a")
    model(**tiny.batch("bert", tiny.rows(4)))
    assert [s.path for s in runtime(model).sites] == [s.path for s in before]
    again = tiny.adapter(model, "dora", "b", target_modules="all-linear")
    assert len(again.paths) == len(before)


class Strange(PreTrainedModel):
    """Names that no table knows."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        block = nn.ModuleDict(
            {"wq": nn.Linear(8, 8), "to_k": nn.Linear(8, 8), "fc_out": nn.Linear(8, 8), "zap": nn.Linear(8, 8)}
        )
        self.words, self.blocks = nn.Embedding(5, 8), nn.ModuleList([block])
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.blocks:
            for layer in block.values():
                x = x + layer(x)
        return x


def test_an_unknown_family_is_read_by_its_names():
    model = Strange(PretrainedConfig(hidden_size=8))
    sites = SiteMap(model)
    assert [s.role for s in sites] == ["attn.q", "attn.k", "mlp.down", "linear.zap"]
    ids = torch.tensor([[1, 2]])
    bare = model(ids)
    adapter = compose.create(model, "lora", {"r": 2, "target_modules": "all-linear"}, name="a")
    compose.activate(model, "a")
    assert torch.equal(model(ids), bare)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.5
    assert not torch.allclose(model(ids), bare)
    compose.eject(model)
    assert torch.equal(model(ids), bare)


class Flat(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.only = nn.Linear(4, 4)
        self.post_init()


def test_a_base_without_known_sites_is_refused():
    model = Flat(PretrainedConfig(hidden_size=4))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SiteError, match=r"Flat.*no linear layer in a numbered block"):
        compose.create(model, "lora", name="a")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "moduloom_adapters")


class Router(nn.Linear):
    """As Llama 4 and Phi-MoE have them: scores of experts, and which are chosen."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.topk(1).indices


class Doubled(nn.Linear):
    """Looks like a linear layer of its weight, and is none."""

    def forward(self, x):
        return 2 * super().forward(x)


class InItsOwnWords(nn.Linear):
    """As Falcon writes it."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_linear_layer_is_one_that_computes_a_product(tiny):
    model = tiny.model("llama")
    for i, cls in enumerate((Router, Doubled, InItsOwnWords, nn.Linear)):
        model.model.layers[i % 2].mlp.add_module(f"extra{i}", cls(32, 4))
    found = {s.path.rpartition(".")[2] for s in SiteMap(model)}
    assert {name for name in found if name.startswith("extra")} == {"extra2", "extra3"}


def test_the_feed_forward_block_beside_a_site_is_its_own():
    torch.manual_seed(0)
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    sites = SiteMap(transformers.SwinModel(config))
    down = [s for s in sites if s.path.endswith("fc2")]
    assert len(down) == 2  # of one stage, which is what the number of a layer says there
    assert [sites.entry_beside(s).path for s in down] == [s.path.replace("fc2", "fc1") for s in down]


@pytest.mark.parametrize("suffix", ["layer.1.EncDecAttention.k", "cross_attn.k_proj", "encoder_attn.k_proj"])
def test_cross_attention_is_none_of_the_texts_own(suffix):
    assert guess_role(suffix) == "cross.k"


def test_models_without_a_table_of_tokens():
    """Images and sounds: what needs a table or one width says so, the rest works."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(hidden_sizes=[8, 16], depths=[1, 1], num_attention_heads=[1, 2])
    config.num_encoder_blocks = 2
    model = transformers.SegformerModel(config)
    sites = SiteMap(model)
    assert sites.embedding == ""
    assert sites.input_table is None
    with pytest.raises(SiteError, match="no one width"):
        _ = sites.hidden_size
    for kind in ("prompt", "prefix", "ladder", "attention_fusion"):
        with pytest.raises((KindError, SiteError)):
            compose.create(model, kind, name=kind)
    compose.activate(model, None)
