"""Parts of fused linears: q, k, v of a qkv layer and gate, up of a gate-up layer are sites of their own."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from torch import nn

import compose
from compose.base.sites import linear_shape
from compose.base.weights import bias_of, dense_weight
from compose.errors import KindError, SiteError
from compose.formats.directory import export_peft
from compose.inspection.adapter_map import interference_of
from compose.kind.registry import kinds
from compose.merging.fold import fold
from compose.merging.merge import merge
from compose.merging.whole_layers import widen
from compose.parameter_space.effect import effect_of
from compose.planning.members import AdapterFinder
from compose.runtime.model_runtime import runtime
from compose.slots.lowering import site_program

IDS = {"vocab_size": 53, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**IDS, **BLOCKS, "intermediate_size": 48, "max_position_embeddings": 48}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 48}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
MODERN = {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}
BASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt_bigcode": ("GPTBigCode", {**GPT2, "multi_query": False}),
    "gpt_bigcode mqa": ("GPTBigCode", {**GPT2, "multi_query": True}),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "bloom": ("Bloom", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {**IDS, **BLOCKS, "multi_query": False}),
    "falcon mqa": ("Falcon", {**IDS, **BLOCKS, "multi_query": True}),
    "falcon new": ("Falcon", {**IDS, **BLOCKS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("Mpt", {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 48}),
    "phi3": ("Phi3", GROUPED),
    "glm4": ("Glm4", GROUPED),
    "modernbert": ("ModernBert", {**PLAIN, **MODERN}),
}
FEW = ("gpt2", "gpt_neox", "phi3")
IDS_IN = torch.arange(4, 20).reshape(2, 8)
SIZES = {"r": 3, "lora_alpha": 5.0, "density": 0.2, "intrinsic_dimension": 20, "bottleneck_size": 4, "alpha": 4.0}
ACTING = ("lora", "dora", "krona", "ia3", "bias", "sparse", "dense", "said", "bottleneck")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A fresh copy of a tiny random model of a family; ``nf4`` goes through a directory, as bitsandbytes wants."""
    made = {}

    def get(family, dtype="fp32"):
        if (family, dtype) not in made:
            name, fields = BASES[family]
            config = getattr(transformers, f"{name}Config")(**fields)
            config._attn_implementation = "eager"
            torch.manual_seed(0)
            head = "ForMaskedLM" if name == "ModernBert" else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
            model = getattr(transformers, name + head)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape)
                    parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + 0.1 * noise)
            if dtype == "nf4":
                where = tmp_path_factory.mktemp("base")
                model.save_pretrained(where)
                model = compose.load(where, quantize="nf4", dtype="fp32")
            made[family, dtype] = model
        return copy.deepcopy(made[family, dtype])

    return get


def logits(model, ids=IDS_IN):
    with torch.no_grad():
        return model(input_ids=ids).logits


def make(model, kind, name="a", seed=1, noise=0.2, **options):
    from compose.kind.registry import get_kind

    fields = get_kind(kind).Config.model_fields
    adapter = compose.create(
        model, kind, {**{k: v for k, v in SIZES.items() if k in fields}, **options}, name=name, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return adapter


def close(a, b, factor=1.0):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 2e-6 * factor * max(1.0, b.abs().max())


# -- where they are ----------------------------------------------------------------------------------------------------


def by_hand(family):
    """Rows of the first q, k and v, written out from the family's own reshape of its fused output."""
    d, e = range(8), 32  # rows of one head, rows of all four
    one_after_another = [[*range(e)], [*range(e, 2 * e)], [*range(2 * e, 3 * e)]]
    head_by_head = [[24 * h + 8 * i + j for h in range(4) for j in d] for i in range(3)]  # (head, 3, 8)
    one_key = [[*range(e)], [*range(e, e + 8)], [*range(e + 8, e + 16)]]
    groups = [
        [32 * g + j for g in range(2) for j in range(16)],
        *[[32 * g + o + j for g in range(2) for j in d] for o in (16, 24)],
    ]
    return {
        "gpt2": one_after_another,
        "gpt_bigcode": head_by_head,
        "gpt_bigcode mqa": one_key,
        "gpt_neox": head_by_head,
        "bloom": head_by_head,
        "falcon": head_by_head,
        "falcon mqa": one_key,
        "falcon new": groups,
        "mpt": one_after_another,
        "phi3": [[*range(32)], [*range(32, 48)], [*range(48, 64)]],
        "modernbert": one_after_another,
    }[family]


@pytest.mark.parametrize("family", [f for f in BASES if f != "glm4"])
def test_rows_are_the_familys(base, family):
    sites = runtime(base(family)).sites
    whole = sites.with_role("attn.qkv")[0]
    parts = sites.parts[whole.path]
    assert [p.role for p in parts] == ["attn.q", "attn.k", "attn.v"]
    every = torch.arange(whole.out_features)
    for part, rows in zip(parts, by_hand(family), strict=True):
        assert part.share(every).tolist() == rows
        assert part.out_features == len(rows)
        spread = part.rows.into(torch.ones(len(rows)))
        assert spread.nonzero().flatten().tolist() == rows
        back = part.rows.into(part.share(torch.randn(whole.out_features, 2)), 0)
        assert back.shape == (whole.out_features, 2)


@pytest.mark.parametrize("family", [f for f in BASES if f not in ("glm4", "modernbert")])
def test_the_model_reads_q_k_and_v_there(base, family):
    """In the first layer a part moves its own tensor in the cache, or none (q), and leaves the others bit for bit."""
    model = base(family)

    def cached():
        with torch.no_grad():
            out = model(input_ids=IDS_IN, use_cache=True)
        layer = out.past_key_values.layers[0]
        return layer.keys.clone(), layer.values.clone(), out.logits

    bare = cached()
    for name, moved in (("q", (False, False)), ("k", (True, False)), ("v", (False, True))):
        make(model, "lora", name, target_modules=f"attn.{name}", layers=(0,))
        compose.activate(model, name)
        after = cached()
        assert (not torch.equal(after[0], bare[0]), not torch.equal(after[1], bare[1])) == moved
        assert not torch.allclose(after[2], bare[2])


@pytest.mark.parametrize("family", ["phi3", "glm4", "modernbert"])
def test_the_model_reads_gate_and_up_there(base, family):
    """The block's output is linear in up, and not in gate."""
    model = base(family)
    block = next(m for path, m in model.named_modules() if path.endswith("layers.0.mlp"))
    x = torch.randn(2, 32)
    bare = block(x)
    for name, linear in (("up", True), ("gate", False)):
        adapter = compose.create(
            model, "dense", {"target_modules": f"mlp.{name}", "layers": (0,), "biases": False}, name=name
        )
        (site,) = runtime(model).sites.select(f"mlp.{name}", layers=(0,))
        adapter.at(site.path, "weight").data.copy_(site.share(dense_weight(runtime(model).slot(site.module).layer)))
        compose.activate(model, name)
        assert torch.allclose(block(x), 2 * bare, atol=1e-5) == linear


def test_they_are_never_a_default(base):
    model = base("gpt2")
    sites = runtime(model).sites
    assert all(site.rows is None for site in (*sites, *sites.select("all-linear")))
    assert {sites[p].role for p in make(model, "lora").paths} == {"attn.qkv"}
    assert [s.name for s in sites.select(("v", "0.attn.q"))] == ["0.attn.q", "0.attn.v", "1.attn.v"]
    with pytest.raises(SiteError, match=r"'vv' matches no linear layer.*did you mean v"):
        sites.select("vv")
    odd = base("gpt2")
    odd.config.n_head = 7  # a table that does not fit the layer is not believed
    with pytest.raises(SiteError, match="96 outputs"):
        compose.create(odd, "lora", name="a")


# -- what they compute -------------------------------------------------------------------------------------------------


class Unfused(nn.Module):
    """Linear layers of its own for each part, at the very paths that the parts have."""

    def __init__(self, layer, family):
        super().__init__()
        self.rows, weight, bias = by_hand(family), dense_weight(layer), bias_of(layer)
        for name, rows in zip("qkv", self.rows, strict=True):
            linear = nn.Linear(weight.shape[1], len(rows), bias=bias is not None)
            with torch.no_grad():
                linear.weight.copy_(weight[rows])
                if bias is not None:
                    linear.bias.copy_(bias[rows])
            self.add_module(name, linear)

    def forward(self, x):
        out = x.new_empty(*x.shape[:-1], sum(map(len, self.rows)))
        for name, rows in zip("qkv", self.rows, strict=True):
            out[..., rows] = getattr(self, name)(x)
        return out


def unfused(model, family):
    for path in [s.path for s in runtime(model).sites.with_role("attn.qkv")]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Unfused(model.get_submodule(path), family))
    compose.eject(model)
    return model


def test_every_kind_with_linear_sites_takes_part():
    outside = {"prefix", "prompt", "ladder", "attention_fusion", "head", "krona_b"}  # the last reads a whole block
    assert set(ACTING) == set(kinds()) - outside


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", ACTING)
def test_as_on_layers_of_their_own(base, kind, family, dtype):
    """Outputs, and gradients of what trains, are those of the same adapter on an unfused copy of the model."""
    model, apart = base(family, dtype), unfused(base(family, dtype), family)
    targets = {"target_modules": ("q", "v")}
    ours, theirs = (
        make(model, kind, **targets),
        compose.create(apart, kind, {**_sized(kind), **targets}, name="a", seed=1),
    )
    assert ours.acts_on_parts
    assert not theirs.acts_on_parts
    theirs.load_state(ours.state())
    bare = logits(model)
    for each in (model, apart):
        compose.activate(each, "a")
        each(input_ids=IDS_IN).logits.square().mean().backward()
    assert not torch.allclose(logits(model), bare, atol=1e-4)
    close(logits(model), logits(apart), factor=10)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, other.grad, factor=20)
    ours.freeze(), theirs.freeze()
    compose.activate(model, ["a", "0.5 * a"])
    halves = logits(model)
    compose.activate(apart, ["a", "0.5 * a"])
    close(halves, logits(apart), factor=10)


def _sized(kind):
    from compose.kind.registry import get_kind

    return {k: v for k, v in SIZES.items() if k in get_kind(kind).Config.model_fields}


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", ACTING)
def test_at_confines_an_adapter_of_the_whole(base, kind, family):
    model = base(family)
    make(model, kind, target_modules="attn.qkv").freeze()
    compose.activate(model, "a")
    whole = logits(model)
    compose.activate(model, 'at(a, sites=["attn.q"]) + at(a, sites=["attn.k", "v"])')
    close(logits(model), whole, factor=20)
    compose.activate(model, 'at(at(a, sites=["attn.q"]), sites=["attn.v"])')
    nothing = logits(model)
    compose.activate(model, None)
    assert torch.equal(nothing, logits(model))
    compose.activate(model, 'at(a, sites=["attn.v"], layers=[0])')
    some = logits(model)
    compose.activate(model, ["a", 'at(a, sites=["attn.v"], layers=[0])'])
    close(logits(model), torch.stack([whole[0], some[1]]), factor=20)


@pytest.mark.parametrize("family", FEW)
def test_at_keeps_parts_by_name(base, family):
    model = base(family)
    make(model, "lora", target_modules=("attn.q", "attn.v")).freeze()
    home = runtime(model)
    whole = home.sites.with_role("attn.qkv")[0].path
    compose.activate(model, 'at(a, sites=["attn.v"])')
    assert len(site_program(home, whole, home.rows).entries) == 1
    compose.activate(model, "a")
    both, q, k, v = effect_of(home, whole, home.rows[0]).dense(), *(p.rows for p in home.sites.parts[whole])
    assert not q.of(both, 0).eq(0).all()
    assert not v.of(both, 0).eq(0).all()
    assert k.of(both, 0).eq(0).all()


def test_an_input_that_parts_share_is_not_scaled_for_one(base):
    model = base("gpt2")
    make(model, "ia3", "part", target_modules="q", feedforward_modules=("q",))
    make(model, "ia3", "whole", target_modules="c_attn", feedforward_modules=("c_attn",))
    for text in ("part", 'at(whole, sites=["attn.k"])'):
        with pytest.raises(KindError, match=r"scales the input of .*c_attn\.[qk].*has in common"):
            compose.activate(model, text)


# -- what else is done with adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("text", ["average(a, b)", "a + 0.5 * c", "d >> a", "ties(a, b, density=0.5)", "cat(a, d)"])
def test_merges_and_folding(base, text, family):
    model = base(family)
    make(model, "lora", "a", target_modules=("attn.q", "attn.v")).freeze()
    make(model, "lora", "b", seed=2, target_modules="attn.qkv").freeze()
    make(model, "dora", "c", seed=3, noise=0.1, target_modules="attn.k").freeze()
    make(model, "dora", "d", seed=4, noise=0.1, target_modules=("attn.k", "attn.v")).freeze()
    compose.activate(model, text)
    active = logits(model)
    bare = base(family)
    for part in fold(model, text):
        bare.get_parameter(part.name).data.copy_(part.value)
    if "ties" not in text:  # which has a limited rank while it is active, and none in a weight
        close(logits(bare), active, factor=20)
    if ">>" not in text:
        runtime(model).add("m", merge(model, text, name="m").adapter)
        compose.activate(model, "m")
        close(logits(model), active, factor=20)


@pytest.mark.parametrize("kind", ACTING)
def test_saved_and_read_back(base, kind, tmp_path):
    model = base("gpt_neox")
    options = {"rank_pattern": {"1.attention.query_key_value.v": 2}} if kind in ("lora", "dora", "krona") else {}
    adapter = make(model, kind, target_modules=("attn.q", "attn.v"), **options).freeze()
    compose.activate(model, "a")
    compose.save(adapter, tmp_path / "a", model=model)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["moduloom_kind"] == kind
    assert "peft_type" not in fields  # PEFT would pass over what it does not find
    again = base("gpt_neox")
    compose.attach(again, "a", tmp_path / "a")
    compose.activate(again, "a")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_peft_reads_them_as_rows_of_whole_layers(base, kind, family, tmp_path):
    model = base(family)
    adapter = make(model, kind, target_modules=("attn.q", "attn.v", "attn.o")).freeze()
    compose.activate(model, "a")
    wide = widen(model, adapter)
    assert wide.certificate.exact
    export_peft(wide.adapter, tmp_path, sites=runtime(model).sites, model=model)
    theirs = peft.PeftModel.from_pretrained(base(family), tmp_path).eval()
    close(logits(theirs), logits(model), factor=10)


def test_a_map_knows_that_a_part_lies_in_the_whole(base, tmp_path):
    model = base("gpt2")
    model.save_pretrained(tmp_path / "base")
    model = compose.load(tmp_path / "base")
    runtime(model).add("whole", widen(model, make(model, "lora", "part", target_modules=("q", "v")).freeze()).adapter)
    for name in ("part", "whole"):
        compose.save(runtime(model).adapter(name), tmp_path / name, model=model)
    found = interference_of([str(tmp_path / "part"), str(tmp_path / "whole")], AdapterFinder(), base=tmp_path / "base")
    assert found.cosine.min() > 1 - 1e-6


@pytest.mark.parametrize("kind", ["krona"])
def test_what_peft_cannot_say_of_rows_is_refused(base, kind):
    model = base("gpt2")
    adapter = make(model, kind, target_modules=("attn.q",))
    with pytest.raises(KindError, match=rf"{kind} adapter 'a' acts on .*c_attn\.q, a part of a fused layer"):
        widen(model, adapter)


def test_a_part_is_as_narrow_as_it_is(base):
    model = base("phi3")
    adapter = compose.create(model, "lora", {"target_modules": "attn.k", "r": 20}, name="a")
    pair = {key.rpartition("lora_")[2]: value.shape for key, value in adapter.state().items() if ".0." in key}
    assert pair == {"A.weight": (20, 32), "B.weight": (16, 20)}
    assert linear_shape(model.get_submodule("model.layers.0.self_attn.qkv_proj")) == (32, 64)
