"""Each kind's formula, place and initial values; the registry; and what is refused, with the old state kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import compose
from compose.base.weights import dense_weight
from compose.errors import KindError, SiteError
from compose.formats.directory import save_adapter
from compose.formats.files import write_tensors
from compose.kind.registry import get_kind, kinds, make_config
from compose.kind.tensors import PREFIX
from compose.runtime.model_runtime import activate, eject, runtime
from hub.contents.checks import WEIGHTS
from hub.errors import NotFound

FAMILIES = ["llama", "qwen2", "gpt2", "bert", "roberta", "t5", "opt", "gpt_neox"]


def near(a, b, bound=1e-5):
    return (a - b).abs().max() <= bound * max(1.0, b.abs().max())


def at_site(model, path, x):
    with torch.no_grad():
        return model.get_submodule(path)(x), runtime(model).slot(path).own(x)


# -- formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 4), (True, 6.0 / 2)])
def test_lora(tiny, rslora, scale):
    model = tiny.model("llama")
    a = tiny.adapter(model, "lora", "a", use_rslora=rslora, target_modules=("q_proj",)).freeze()
    activate(model, "a")
    path, x = "model.layers.0.self_attn.q_proj", torch.randn(2, 3, 32)
    got, base = at_site(model, path, x)
    assert near(got, base + scale * x @ a.at(path, "A").T @ a.at(path, "B").T)
    assert set(a.state()) == {
        f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_{m}.weight" for i in range(2) for m in "AB"
    }


def test_fresh_low_rank_values(tiny):
    model = tiny.model("llama")
    a = tiny.adapter(model, "lora", "a", noise=0.0, target_modules="all-linear")
    for path in a.paths:
        bound = 1 / math.sqrt(a.at(path, "A").shape[1])  # kaiming_uniform(sqrt 5)
        assert a.at(path, "A").abs().max() <= bound
        assert a.at(path, "A").std() > bound / 3
        assert not a.at(path, "B").any()
    again = tiny.adapter(model, "lora", "b", noise=0.0, target_modules="all-linear")
    other = tiny.adapter(model, "lora", "c", noise=0.0, seed=2, target_modules="all-linear")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_takes_the_norm_of_the_changed_weight(tiny, family, dtype):
    model = tiny.model(family, dtype)
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    a = tiny.adapter(model, "dora", "a", target_modules=(path,)).freeze()
    weight = dense_weight(runtime(model).slot(path).layer).float()
    fresh = tiny.adapter(model, "dora", "fresh", noise=0.0, target_modules=(path,))
    assert near(fresh.at(path, "magnitude"), weight.norm(dim=1))
    activate(model, "a")
    changed = weight + a.config.scale * a.at(path, "B") @ a.at(path, "A")
    gain = a.at(path, "magnitude") / changed.norm(dim=1)
    x = torch.randn(2, 3, weight.shape[1])
    got, base = at_site(model, path, x)
    bias = getattr(runtime(model).slot(path).layer, "bias", None)
    bias = torch.zeros(()) if bias is None else bias
    expected = gain * (base - bias + a.config.scale * x @ a.at(path, "A").T @ a.at(path, "B").T) + bias
    assert near(got, expected, {"fp32": 1e-5, "nf4": 1e-4, "int8": 3e-2}[dtype])


def test_dora_holds_the_norm_constant_in_backward(tiny):
    model = tiny.model("llama")
    path = "model.layers.0.self_attn.q_proj"
    a = tiny.adapter(model, "dora", "a", target_modules=(path,), layers=(0,))
    activate(model, "a")
    x = torch.randn(2, 3, 32)
    runtime(model).refresh()
    model.get_submodule(path)(x).square().sum().backward()
    weight = dense_weight(runtime(model).slot(path).layer).detach()
    low, up, m = (a.at(path, n).detach().clone().requires_grad_() for n in ("A", "B", "magnitude"))
    changed = weight + a.config.scale * up @ low
    gain = m / changed.norm(dim=1).detach()
    F.linear(x, gain[:, None] * changed).square().sum().backward()
    for name, reference in (("A", low), ("B", up), ("magnitude", m)):
        assert near(a.at(path, name).grad, reference.grad, 1e-4), name


def test_ia3_scales_keys_values_and_the_inner_activation(tiny):
    model = tiny.model("opt")
    a = tiny.adapter(model, "ia3", "a").freeze()
    activate(model, "a")
    stem = "model.decoder.layers.0."
    x = torch.randn(2, 3, 32)
    for name in ("self_attn.k_proj", "self_attn.v_proj"):
        got, base = at_site(model, stem + name, x)
        assert near(got, base * a.at(stem + name, "out").flatten())  # the bias too
    layer = runtime(model).slot(stem + "fc2").own
    x = torch.randn(2, 3, 48)
    got, _ = at_site(model, stem + "fc2", x)
    assert near(got, layer(x * a.at(stem + "fc2", "in").flatten()))
    shapes = {key.removeprefix(PREFIX + stem): tuple(v.shape) for key, v in a.state().items() if stem in key}
    assert shapes["self_attn.k_proj.ia3_l"] == (32, 1)
    assert shapes["fc2.ia3_l"] == (1, 48)


@pytest.mark.parametrize(
    ("style", "places", "activation"),
    [
        ("houlsby", ["self_attn.out_proj", "fc2"], F.gelu),
        ("pfeiffer", ["fc2"], F.relu),
        ("parallel", ["fc2"], F.relu),
    ],
)
def test_bottleneck_styles(tiny, style, places, activation):
    model = tiny.model("opt")
    a = tiny.adapter(model, "bottleneck", "a", style=style, scaling=2.0).freeze()
    assert sorted(a.paths) == sorted(f"model.decoder.layers.{i}.{p}" for i in range(2) for p in places)
    activate(model, "a")
    layer = model.model.decoder.layers[0]
    x = torch.randn(5, 32)
    path = "model.decoder.layers.0.fc2"
    with torch.no_grad():
        inner = layer.activation_fn(layer.fc1(x))
        base = runtime(model).slot(path).own(inner)
        z = x if style == "parallel" else base
        hidden = activation(z @ a.at(path, "down").T + a.at(path, "down_b"))
        expected = base + 2.0 * (hidden @ a.at(path, "up").T + a.at(path, "up_b"))
        assert near(layer.fc2(inner), expected)


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bottleneck_on_every_family(tiny, family, style):
    model = tiny.model(family)
    rows = tiny.rows(5, 3)
    batch = tiny.batch(family, rows)
    bare = tiny.logits(model, batch)
    fresh = tiny.adapter(model, "bottleneck", "a", style=style, noise=0.0)
    assert fresh.identity_at_init == (style == "parallel")
    activate(model, "a")
    assert all(near(a, b, 1e-3) for a, b in zip(tiny.logits(model, batch), bare, strict=True))
    assert tiny.adapter(model, "bottleneck", "a", style="houlsby", init="lora", noise=0.0).identity_at_init
    tiny.adapter(model, "bottleneck", "a", style=style)
    model(**batch).logits.square().mean().backward()
    runtime(model).adapters["a"].freeze()
    alone = tiny.logits(model, tiny.batch(family, rows[1:]))[0]
    assert not near(alone, bare[1], 0.05)
    activate(model, [None, "a"])
    together = tiny.logits(model, batch)
    assert near(together[0], bare[0])
    assert near(together[1], alone)


def test_bottleneck_sizes(tiny):
    model = tiny.model("llama")
    path = "model.layers.0.mlp.down_proj"
    for options, width in [
        ({"reduction_factor": 8, "bottleneck_size": None}, 4),
        ({"bottleneck_size": 5}, 5),
        ({"bottleneck_size": None}, 2),
    ]:
        assert tiny.adapter(model, "bottleneck", "a", **options).at(path, "down").shape == (width, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_places(tiny, family):
    """Every bias of the blocks and norms; a base without biases gets zero ones at its linears."""
    model = tiny.model(family)
    a = tiny.adapter(model, "bias", "a")
    biased = {n.rpartition(".")[0] for n, _ in tiny.model(family).named_parameters() if n.endswith(".bias")}
    linear = {s.path for s in runtime(model).sites}
    if family in ("llama", "t5"):
        assert not biased & linear
        assert set(a.paths) == linear
    else:
        assert {p for p in biased if p in linear} <= set(a.paths)
        assert any("norm" in p.lower() or "ln_" in p for p in a.paths) == any(
            "norm" in p.lower() or "ln_" in p for p in biased
        )
        assert set(a.paths) <= biased
    only = tiny.adapter(model, "bias", "b", layers=(1,))
    assert {runtime(model).sites[p].layer for p in only.paths} == {1}


def test_prefix_and_prompt_are_stored_as_peft_does(tiny):
    model = tiny.model("llama")  # 2 layers, 2 key-value heads of 8
    assert {k: tuple(v.shape) for k, v in tiny.adapter(model, "prefix", "p").state().items()} == {
        "prompt_embeddings": (3, 2 * 2 * 2 * 8)
    }
    assert {k: tuple(v.shape) for k, v in tiny.adapter(model, "prompt", "q").state().items()} == {
        "prompt_embeddings": (3, 32)
    }
    fresh = tiny.adapter(model, "prompt", "v", noise=0.0)
    table = model.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in fresh.at("", "P"))
    uniform = tiny.adapter(model, "prompt", "u", noise=0.0, init="uniform").at("", "P")
    assert uniform.abs().max() <= 0.5


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck"])
def test_layers_and_targets_narrow_the_place(tiny, kind):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    a = tiny.adapter(model, kind, "a", layers=(1,)).freeze()
    assert a.paths
    assert all(".layers.1." in p for p in a.paths)
    b = tiny.adapter(model, kind, "b", target_modules=("mlp.down", "o_proj")).freeze()
    assert {p.rsplit(".", 1)[-1] for p in b.paths} == {"down_proj", "o_proj"}
    bare = tiny.logits(model, batch)
    activate(model, "a + b")
    assert not near(tiny.logits(model, batch)[0], bare[0], 0.01)


# -- the registry --------------------------------------------------------------------------------------------------


def test_kinds_are_found_by_name():
    assert set(kinds()) >= {"lora", "dora", "ia3", "bias", "bottleneck", "prefix", "prompt"}
    assert all(get_kind(name).kind == name for name in kinds())
    assert all(cls.__doc__ and cls.paper.startswith(("arXiv:", "doi:")) for cls in kinds().values())


@pytest.mark.parametrize(("wrong", "right"), [("lorra", "lora"), ("prefx", "prefix"), ("bottle-neck", "bottleneck")])
def test_an_unknown_kind_gets_a_suggestion(tiny, wrong, right):
    with pytest.raises(KindError, match=f"did you mean {right}"):
        compose.create(tiny.model("llama"), wrong, name="a")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lora", {"rank": 8}, "no option 'rank'"),
        ("lora", {"lora_alpa": 8}, "did you mean 'lora_alpha'"),
        ("lora", {"r": 0}, "option r"),
        ("lora", {"r": "many"}, "option r"),
        ("lora", {"lora_alpha": float("nan")}, "option lora_alpha"),
        ("lora", {"lora_dropout": 1.0}, "option lora_dropout"),
        ("lora", {"target_modules": ("q_prj",)}, "'q_prj' matches no.*did you mean q_proj"),
        ("lora", {"target_modules": ()}, "empty"),
        ("lora", {"layers": (0, 7)}, r"layers \[7\]"),
        ("lora", {"layers": ()}, "empty"),
        ("dora", {"target_modules": ("attn.qkv",)}, "matches no"),
        ("bottleneck", {"style": "parallell"}, "option style"),
        ("bottleneck", {"non_linearity": "geluu"}, "'geluu'; did you mean '?gelu"),
        ("prefix", {"num_virtual_tokens": 0}, "option num_virtual_tokens"),
        ("ia3", {"feedforward_modules": ("fc9",)}, "fc9"),
    ],
)
def test_bad_options_are_named_and_change_nothing(tiny, kind, options, message):
    model = tiny.model("llama")
    tiny.adapter(model, "lora", "kept").freeze()
    activate(model, "kept")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    before, modules = tiny.logits(model, batch), [type(m) for m in model.modules()]
    with pytest.raises((KindError, SiteError), match=message):
        compose.create(model, kind, options, name="a")
    assert "a" not in runtime(model).adapters
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), before, strict=True))


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(KindError, match="not the config of kind 'dora'"):
        make_config(get_kind("dora"), get_kind("ia3").Config())


# -- tensors that do not fit ---------------------------------------------------------------------------------------


def spoil(tensors, how):
    key = min(k for k, v in tensors.items() if v.is_floating_point())
    spoiled = {k: v.clone() for k, v in tensors.items()}
    if how == "missing":
        del spoiled[key]
    elif how == "extra":
        spoiled[key + ".more"] = torch.zeros(1)
    elif how == "misshapen":
        spoiled[key] = torch.zeros(*spoiled[key].shape, 2)
    elif how == "infinite":
        spoiled[key].view(-1)[0] = torch.inf
    else:
        spoiled[key].view(-1)[0] = torch.nan
    return key, spoiled


@pytest.mark.parametrize("how", ["missing", "extra", "misshapen", "nan", "infinite"])
@pytest.mark.parametrize("kind", sorted(kinds()))
def test_tensors_that_do_not_fit_are_refused_by_name(tiny, kind, how, tmp_path):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, kind, "a").freeze()
    key, spoiled = spoil(adapter.state(), how)
    kept = {k: v.clone() for k, v in adapter.state().items()}
    if how in ("missing", "extra", "misshapen"):
        with pytest.raises(KindError) as caught:
            adapter.load_state(spoiled)
        assert key in str(caught.value)
        assert all(torch.equal(v, kept[k]) for k, v in adapter.state().items())
    save_adapter(adapter, tmp_path, runtime(model).sites)
    write_tensors(tmp_path / WEIGHTS, spoiled)
    with pytest.raises(KindError) as caught:
        compose.attach(model, "b", tmp_path)
    assert key in str(caught.value)
    assert "b" not in runtime(model).adapters


# -- activation that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "weights", "error", "message"),
    [
        ("a + lorra", None, NotFound, "no adapter 'lorra'.*did you mean lora"),
        ("a", {"lorra": 1.0}, NotFound, "no adapter 'lorra'"),
        (["a", "b", "c"], None, NotFound, "no adapter 'c'"),
        ("ensemble.mean(a, b)", None, KindError, "cannot be activated"),
        ("a + b", {"a": torch.ones(2), "b": torch.ones(3)}, KindError, "2 rows of 'a', 3 rows of 'b'"),
        (["a", "b", None], {"a": torch.ones(2)}, KindError, "3 expressions, 2 rows of 'a'"),
        ("a", {"a": torch.ones(2, 3, 4)}, KindError, "shape"),
        ("a + b", {"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, KindError, "3 tokens of 'a', 4 tokens of 'b'"),
        ("a", {"a": float("nan")}, KindError, "nan"),
        ("a", {"a": torch.tensor([1.0, float("inf")])}, KindError, "not finite"),
        ([], None, KindError, "empty list"),
        ("average(p, p2)", None, KindError, "p2"),
        ("a + -1 * p", None, KindError, "negative"),
    ],
)
def test_what_was_active_stays_active(tiny, expr, weights, error, message):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, "lora", "lora").freeze()
    for seed, name in enumerate("ab"):
        tiny.adapter(model, "lora", name, seed=seed).freeze()
    tiny.adapter(model, "prefix", "p").freeze()
    tiny.adapter(model, "prefix", "p2", size=1).freeze()
    activate(model, "0.5 * a >> p", weights={"a": torch.tensor([1.0, 2.0])})
    before, rows, residents = tiny.logits(model, batch), runtime(model).rows, set(runtime(model).adapters)
    with pytest.raises(error, match=message):
        compose.activate(model, expr, weights=weights)
    assert runtime(model).rows == rows
    assert set(runtime(model).adapters) == residents
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), before, strict=True))


def test_an_active_adapter_is_not_detached(tiny):
    model = tiny.model("llama")
    tiny.adapter(model, "lora", "a").freeze()
    activate(model, "a")
    with pytest.raises(KindError, match="'a' is active"):
        compose.detach(model, "a")
    activate(model, None)
    compose.detach(model, "a")
    with pytest.raises(NotFound, match="'a'"):
        compose.detach(model, "a")
    eject(model)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_krona_b_stands_beside_the_block(tiny, family, residual):
    """KronA^B: FFN(z) + s (L kron R) z, and t z for the residual one, z what enters the block."""
    model = tiny.model(family)
    adapter = tiny.adapter(model, "krona_b", "a", layers=(0,), scaling=0.5, residual=residual)
    (path,) = adapter.paths
    activate(model, "a")
    seen = {}
    entry = model.get_submodule(runtime(model).sites.entry_beside(runtime(model).sites[path]).path)
    entry.register_forward_pre_hook(lambda _, args: seen.update(z=args[0].detach()))
    slot = runtime(model).slot(path)
    slot.layer.register_forward_hook(lambda _, args, out: seen.update(pair=(slot.own(args[0]), out)))
    tiny.logits(model, tiny.batch(family, tiny.rows(4)))
    before, after = seen["pair"]
    matrix = 0.5 * torch.kron(adapter.at(path, "L"), adapter.at(path, "R"))
    if residual:
        matrix = matrix + adapter.at(path, "t") * torch.eye(32)
    torch.testing.assert_close(after - before, seen["z"] @ matrix.T, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(after).all()
