"""A prefix is n tokens in the cache that were never read: compared with a bare model whose cache holds them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import compose
from compose.atoms import Prefix
from compose.errors import KindError
from compose.runtime.model_runtime import activate, eject, runtime
from compose.runtime.prefixes import _with_prefix, stack_prefixes

CAUSAL = ["llama", "qwen2", "gpt2", "opt", "gpt_neox"]


def near(a, b, bound=1e-5):
    return (a - b).abs().max() <= bound * max(1.0, b.abs().max())


def prefixed(tiny, family, expr="p", **config):
    model = tiny.model(family, **config)
    tiny.adapter(model, "prefix", "p").freeze()
    tiny.adapter(model, "prefix", "q", seed=2, size=1).freeze()
    activate(model, expr)
    return model


def cache_of(model, names):
    """A cache that holds the prefixes called ``names`` one after the other."""
    adapters = [runtime(model).adapters[name] for name in names]
    cache = DynamicCache()
    for layer, path in enumerate(adapters[0].paths):
        parts = [a.prefix(path) for a in adapters]
        key = torch.cat([p.key for p in parts]).transpose(0, 1)[None].detach()
        value = torch.cat([p.value for p in parts]).transpose(0, 1)[None].detach()
        cache.update(key.clone(), value.clone(), layer)
    return cache


def with_cache(tiny, family, model, row, weights, mask=None):
    """The bare model reading ``row`` after the cached prefixes {name: weight, a number or one per token}."""
    bare, cache, length = tiny.model(family), cache_of(model, weights), len(row)
    logs = []
    for name, weight in weights.items():
        n = runtime(model).adapters[name].config.num_virtual_tokens
        logs.append(torch.as_tensor(weight).float().log().reshape(-1, 1).expand(length, n))
    causal = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    n = sum(log.shape[1] for log in logs)
    with torch.no_grad():
        return bare(
            input_ids=row[None],
            attention_mask=torch.cat([*logs, causal], dim=1)[None, None],
            position_ids=torch.arange(n, n + length)[None],
            past_key_values=cache,
        ).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CAUSAL)
def test_it_is_n_cached_tokens(tiny, family, attention):
    model = prefixed(tiny, family, attn_implementation=attention)
    rows = tiny.rows(5, 3)
    got = tiny.logits(model, tiny.batch(family, rows, "left"))
    for row, ours in zip(rows, got, strict=True):
        assert near(ours, with_cache(tiny, family, model, row, {"p": 1.0}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_is_a_share_of_the_attention(tiny, family):
    model = prefixed(tiny, family)
    rows = tiny.rows(4, 4)
    token = torch.rand(2, 4) + 0.1
    cases = [
        ({"expr": "0.3 * p"}, [{"p": 0.3}] * 2),
        ({"expr": "p >> q"}, [{"p": 1.0, "q": 1.0}] * 2),
        ({"expr": "2 * p + 0.5 * q"}, [{"q": 0.5, "p": 2.0}] * 2),
        ({"expr": ["0.3 * p", "q"]}, [{"p": 0.3}, {"q": 1.0}]),
        ({"expr": "p", "weights": {"p": torch.tensor([0.25, 3.0])}}, [{"p": 0.25}, {"p": 3.0}]),
        ({"expr": "p", "weights": {"p": token}}, [{"p": token[0]}, {"p": token[1]}]),
    ]
    for composition, weights in cases:
        activate(model, **composition)
        got = tiny.logits(model, tiny.batch(family, rows))
        for row, ours, w in zip(rows, got, weights, strict=True):
            assert near(ours, with_cache(tiny, family, model, row, w)), (composition, w)


def test_the_order_of_a_sum_does_not_matter_and_halves_add_up(tiny):
    model = prefixed(tiny, "llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    whole = tiny.logits(model, batch)
    for expr in ("0.5 * p + 0.5 * p", "average(p, p)", "average(p)"):
        activate(model, expr)
        assert all(near(a, b) for a, b in zip(tiny.logits(model, batch), whole, strict=True)), expr
    activate(model, "p + q")
    one = tiny.logits(model, batch)
    activate(model, "q + p")
    assert all(near(a, b) for a, b in zip(tiny.logits(model, batch), one, strict=True))


def decoder_with_cache(tiny, model, source, targets):
    """A bare T5 whose decoder has the prefix in its self-attention cache."""
    bare = tiny.model("t5")
    cache = EncoderDecoderCache(cache_of(model, ["p"]), DynamicCache())
    with torch.no_grad():
        return bare(input_ids=source, decoder_input_ids=targets, past_key_values=cache).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_relative_positions_count_the_prefix(tiny, attention):
    """T5's position bias of n virtual tokens is that of n real ones before the text, near and far (8 buckets, 12)."""
    model = prefixed(tiny, "t5", attn_implementation=attention)
    source, targets = torch.stack(tiny.rows(5)), torch.stack(tiny.rows(14, seed=3))
    expected = decoder_with_cache(tiny, model, source, targets)
    with torch.no_grad():
        assert near(model(input_ids=source, decoder_input_ids=targets).logits, expected)
        for cache in (None, EncoderDecoderCache(*(StaticCache(model.config, max_cache_len=n) for n in (20, 5)))):
            states, out = model.get_encoder()(input_ids=source), []
            for start, end in [(0, 6), (6, 7), (7, 12), (12, 14)]:
                step = model(
                    encoder_outputs=states,
                    decoder_input_ids=targets[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = step.past_key_values
                out.append(step.logits)
            assert near(torch.cat(out, 1), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_static_cache(tiny, family):
    model = prefixed(tiny, family, ["p", "q", None])
    batch = tiny.batch(family, tiny.rows(5, 3, 4), "left")
    whole = model(**batch, use_cache=False).logits.detach()
    cache, out = StaticCache(model.config, max_cache_len=7), []
    with torch.no_grad():
        for start, end in [(0, 3), (3, 4), (4, 5)]:
            step = {"attention_mask": batch["attention_mask"][:, :end], "past_key_values": cache}
            step |= {k: batch[k][:, start:end] for k in ("input_ids", "position_ids")}
            out.append(model(**step, use_cache=True).logits[:, -1])
    assert near(torch.stack(out[1:], 1), whole[:, 3:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_sdpa_is_eager(tiny, family):
    batch = tiny.batch(family, tiny.rows(5, 3, 4))
    expr = ["p", "0.5 * p + q", None]
    sdpa, eager = (prefixed(tiny, family, expr, attn_implementation=a) for a in ("sdpa", "eager"))
    assert all(near(a, b) for a, b in zip(tiny.logits(sdpa, batch), tiny.logits(eager, batch), strict=True))
    with torch.no_grad():
        out = eager(**batch, output_attentions=True)
    weights = (out.decoder_attentions if family == "t5" else out.attentions)[0]  # (B, H, q, n + k)
    assert weights.shape[-1] == weights.shape[-2] + 5
    assert near(weights.sum(-1), torch.ones(()))
    assert weights[2, :, :, :5].max() == 0, "a row without a prefix looks at it"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "opt", "bert"])
def test_checkpointing_gives_the_same_gradient(tiny, family):
    model = tiny.model(family)
    adapters = [tiny.adapter(model, "prefix", "p"), tiny.adapter(model, "prefix", "q", size=1)]
    activate(model, ["p", "p + q", "q"])
    batch = tiny.batch(family, tiny.rows(5, 3, 4))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        model(**batch, use_cache=False).logits.square().mean().backward()
        return [a.at("", "P").grad.clone() for a in adapters]

    plain = gradients()
    model.train()
    for m in model.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    model.gradient_checkpointing_enable()
    again = gradients()
    assert all(near(a, b) for a, b in zip(again, plain, strict=True))


def test_the_attention_is_the_bases_own_again(tiny):
    model = prefixed(tiny, "gpt2")
    tiny.adapter(model, "lora", "l").freeze()
    assert model.config._attn_implementation == "moduloom_sdpa"
    activate(model, "l")
    assert model.config._attn_implementation == "sdpa"
    activate(model, "l + p", weights={"p": 0.0})
    assert model.config._attn_implementation == "sdpa"
    activate(model, "p")
    eject(model)
    assert model.config._attn_implementation == "sdpa"


def test_another_implementation_chosen_while_active(tiny):
    model = prefixed(tiny, "llama", ["p", "q"])
    batch = tiny.batch("llama", tiny.rows(5, 3))
    before = tiny.logits(model, batch)
    model.set_attn_implementation("eager")
    assert all(near(a, b) for a, b in zip(tiny.logits(model, batch), before, strict=True))
    assert model.config._attn_implementation == "moduloom_eager"
    eject(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        ({"expr": "-1 * p"}, "negative"),
        ({"expr": "p - q"}, "negative"),
        ({"expr": "p", "weights": {"p": torch.tensor([1.0, -0.5])}}, "negative"),
    ],
)
def test_a_negative_share_is_refused(tiny, composition, message):
    model = prefixed(tiny, "llama", "q")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    before = tiny.logits(model, batch)
    with pytest.raises(KindError, match=message):
        activate(model, **composition)
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), before, strict=True))


def test_other_attention_is_refused(tiny):
    model = tiny.model("llama", attn_implementation="flex_attention")
    tiny.adapter(model, "prefix", "p").freeze()
    with pytest.raises(KindError, match="flex_attention") as caught:
        activate(model, "p")
    assert "sdpa" in caught.value.hint
    assert model.config._attn_implementation == "flex_attention"
    activate(model, None)


def test_options_that_mean_nothing_are_refused(tiny):
    model = tiny.model("llama")
    with pytest.raises(KindError, match="no target_modules"):
        tiny.adapter(model, "prefix", "p", target_modules=("q_proj",))


def test_a_prefix_may_act_in_some_layers_only(tiny, tmp_path):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "prefix", "p", layers=(1,))
    activate(model, "p")
    assert adapter.paths == ("model.layers.1.self_attn",)
    assert adapter.at("", "P").shape == (3, 2 * 2 * 8)
    batch = tiny.batch("llama", tiny.rows(5, 3))
    compose.save(adapter, tmp_path, model=model)
    other = tiny.model("llama")
    compose.attach(other, "q", tmp_path)
    activate(other, "q")
    for ours, theirs in zip(tiny.logits(other, batch), tiny.logits(model, batch), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_one_query_reads_prefix_and_cache_apart_or_together(mask, rows):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(4, heads, n, 8, generator=generator) for heads, n in ((6, 1), (2, 9), (2, 9)))
    prefixes = [(0.3 + i, Prefix(*torch.randn(2, 3 + i % 2, 2, 8, generator=generator))) for i in range(rows)]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    module.moduloom_prefix = lambda: stack_prefixes([[p] for p in prefixes])
    seen = torch.rand(4, 1, 1, 9, generator=generator) > 0.3
    seen = seen if mask == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    def together(*args, **options):
        return sdpa_attention_forward(*args, **options)

    apart, expected = (_with_prefix(f, module, query, key, value, seen)[0] for f in (sdpa_attention_forward, together))
    assert expected.shape == (4, 1, 6, 8)
    torch.testing.assert_close(apart, expected)
