"""The life of slots: heads, modes of autograd, copies, dropout, names, and calls that fail half way."""

from __future__ import annotations

import copy

import pytest
import torch

from compose.errors import KindError, SiteError
from compose.formats.directory import read_adapter, save_adapter
from compose.runtime.model_runtime import activate, eject, runtime
from hub.contents.checks import EXTRA

HEADS = {"bert": "classifier", "roberta": "classifier", "llama": "score", "gpt2": "score", "opt": "score"}


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def near(ours, theirs, bound=1e-5):
    return all((a - b).abs().max() <= bound * max(1.0, b.abs().max()) for a, b in zip(ours, theirs, strict=True))


# -- whole modules (modules_to_save) -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", HEADS)
def test_heads_train_apart_and_mix_by_row(tiny, family, dtype, tmp_path):
    model = tiny.model(family, dtype, task="classification")
    rows = tiny.rows(5, 3, 4)
    batch = tiny.batch(family, rows)
    bare = tiny.logits(model, batch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bound = {"fp32": 1e-5, "nf4": 1e-5, "bf16": 5e-2}[dtype]

    for seed, name in enumerate("ab", start=1):
        tiny.adapter(model, "lora", name, seed=seed, modules_to_save=(HEADS[family],))
    a, b = runtime(model).adapters.values()
    activate(model, "a")
    out = model(**batch, labels=torch.tensor([0, 1, 2]))
    out.loss.backward()
    head = a.head(HEADS[family])
    assert out.logits.dtype == model.dtype
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    assert all(p.grad is None for p in runtime(model).slot(HEADS[family]).layer.parameters())

    a.freeze(), b.freeze()
    alone = []
    for row, expr in zip(rows, ["a", None, "b"], strict=True):
        activate(model, expr)
        alone += tiny.logits(model, tiny.batch(family, [row]))
    assert not near(alone[:1], bare[:1], 0.05)
    activate(model, ["a", None, "b"])
    assert near(tiny.logits(model, batch), alone, bound)
    activate(model, "average(a, b)")
    mean = tiny.logits(model, batch)
    assert all(torch.isfinite(y).all() for y in mean)

    activate(model, "a")
    outputs = tiny.logits(model, batch)
    save_adapter(a, tmp_path, runtime(model).sites)
    assert (tmp_path / EXTRA).exists()
    again = read_adapter(tmp_path, runtime(model).sites, model, name="again")
    assert again.state().keys() == a.state().keys()
    assert all(torch.equal(again.state()[k], v) for k, v in a.state().items())
    runtime(model).add("again", again)
    activate(model, "again")
    assert equal(tiny.logits(model, batch), outputs)

    eject(model)
    assert equal(tiny.logits(model, batch), bare)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "t5", "opt"])
def test_a_saved_head_leaves_the_tied_embedding_alone(tiny, family):
    model = tiny.model(family)
    batch = tiny.batch(family, tiny.rows(5, 3))
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding  # tied
    before = embedding.clone()
    adapter = tiny.adapter(model, "lora", "a", noise=0.0, modules_to_save=("lm_head",))
    bare = tiny.logits(tiny.model(family), batch)
    activate(model, "a")
    assert near(tiny.logits(model, batch), bare)
    model(**batch).logits.square().mean().backward()
    with torch.no_grad():
        for p in adapter.head("lm_head").parameters():
            p -= p.grad
    assert not near(tiny.logits(model, batch), bare, 1e-3)
    assert torch.equal(embedding, before)
    eject(model)
    assert model.get_output_embeddings().weight is embedding


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_a_saved_embedding_is_the_one_that_is_read(tiny, family):
    """On T5 the model's own table is ``shared``; the stacks look words up in tables of their own, tied to it."""
    model = tiny.model(family)
    batch = tiny.batch(family, tiny.rows(5, 3))
    bare = tiny.logits(model, batch)
    name = {"llama": "embed_tokens", "gpt2": "wte", "t5": "embed_tokens", "bert": "word_embeddings"}[family]
    adapter = tiny.adapter(model, "lora", "a", noise=0.0, modules_to_save=(name,))
    activate(model, "a")
    assert near(tiny.logits(model, batch), bare)
    model(**batch).logits.square().mean().backward()
    heads = [adapter.head(path) for path in adapter.saved]
    assert all(p.grad.abs().max() > 0 for head in heads for p in head.parameters())
    with torch.no_grad():
        for head in heads:
            head.weight += 0.5 * torch.randn(head.weight.shape)
    adapter.freeze()
    rows = tiny.rows(5, 3)
    activate(model, "a")
    alone = tiny.logits(model, tiny.batch(family, rows[:1]))
    assert not near(alone, bare[:1], 0.05)
    activate(model, ["a", None])
    assert near(tiny.logits(model, batch), [alone[0], bare[1]])


def test_a_carried_module_that_does_not_exist_is_named(tiny):
    model = tiny.model("bert", task="classification")
    with pytest.raises(SiteError, match="clasifier") as caught:
        tiny.adapter(model, "lora", "a", modules_to_save=("clasifier",))
    assert "classifier" in caught.value.hint


# -- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "prefix", "prompt"])
def test_what_inference_mode_kept_does_not_meet_autograd(tiny, kind):
    """Frozen factors are gathered at first use; that use may be in inference mode and the next one with gradient."""
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, kind, "a").freeze()
    tiny.adapter(model, kind, "b", seed=2).freeze()
    for composition in ("a + b", ["a", "b"]):
        activate(model, composition)
        with torch.inference_mode():
            first = model(**batch).logits.clone()
        embeds = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        rest = {k: v for k, v in batch.items() if k != "input_ids"}
        out = model(inputs_embeds=embeds, **rest).logits
        out.square().mean().backward()
        assert embeds.grad.abs().max() > 0
        assert near([out.detach()], [first])


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "prefix", "prompt"])
def test_training_goes_on_after_a_look_in_inference_mode(tiny, kind):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    adapter = tiny.adapter(model, kind, "a")
    activate(model, "a")
    for _ in range(2):
        with torch.inference_mode():
            seen = model(**batch).logits
            tokens = model.generate(**tiny.batch("llama", tiny.rows(3)), max_new_tokens=2, min_new_tokens=2)
        assert tokens.shape == (1, 5)
        model.zero_grad()
        out = model(**batch).logits
        assert near([out.detach()], [seen])
        out.square().mean().backward()
        assert all(p.grad is not None for p in adapter.parameters())
        with torch.no_grad():
            for p in adapter.parameters():
                p -= 0.1 * p.grad


def test_dropout_only_while_training(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(6, 6))
    for kind, options in [
        ("lora", {"lora_dropout": 0.5}),
        ("dora", {"lora_dropout": 0.5}),
        ("bottleneck", {"dropout": 0.5}),
    ]:
        adapter = tiny.adapter(model, kind, kind, **options)
        activate(model, kind)
        twice = [model(**batch).logits.detach() for _ in range(2)]  # eval mode, gradient on: a validation loss
        assert torch.equal(*twice), kind
        model.train()
        one, other = (model(**batch).logits.detach() for _ in range(2))
        assert not torch.equal(one, other), kind
        with torch.no_grad():  # as the first pass of reentrant gradient checkpointing
            assert not torch.equal(model(**batch).logits, model(**batch).logits), kind
        adapter.freeze()
        assert torch.equal(model(**batch).logits, model(**batch).logits), kind
        model.eval()
        adapter.unfreeze()
        assert near([model(**batch).logits.detach()], [twice[0]])


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "prefix", "prompt"])
def test_a_deep_copy_is_a_model_of_its_own(tiny, kind):
    model = tiny.model("t5")
    batch = tiny.batch("t5", tiny.rows(5, 3))
    adapter = tiny.adapter(model, kind, "a")
    activate(model, "a")
    outputs = model(**batch).logits.detach()  # live: the slots hold a graph
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, outputs)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch).logits, outputs), "the copy uses the original's parameters"
    assert not torch.equal(model(**batch).logits, outputs)
    runtime(twin).adapters["a"].freeze()
    frozen_twin = copy.deepcopy(twin)
    assert near([frozen_twin(**batch).logits.detach()], [outputs])
    eject(twin)
    assert near(tiny.logits(twin, batch), tiny.logits(tiny.model("t5"), batch))
    assert not torch.equal(frozen_twin(**batch).logits, twin(**batch).logits)


def test_attach_while_active_takes_effect(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, "lora", "a").freeze()
    activate(model, "a")
    first = tiny.logits(model, batch)
    tiny.adapter(model, "lora", "a", seed=9).freeze()
    second = tiny.logits(model, batch)
    assert not near(first, second, 0.05)
    activate(model, "a")
    assert equal(tiny.logits(model, batch), second)


def test_what_cannot_take_an_active_place_leaves_it(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, "lora", "a").freeze()
    activate(model, "0.5 * a")
    before = tiny.logits(model, batch)
    with pytest.raises(KindError, match="half"):
        tiny.adapter(model, "prompt", "a")
    assert runtime(model).adapters["a"].kind == "lora"
    assert equal(tiny.logits(model, batch), before)
    foreign = tiny.adapter(tiny.model("gpt2"), "lora", "a")
    with pytest.raises(KindError, match=r"acts at transformer\.h\.0\.attn\.c_attn, which this llama model"):
        runtime(model).add("a", foreign)
    assert equal(tiny.logits(model, batch), before)


@pytest.mark.parametrize("kind", ["lora", "dora", "bottleneck", "prefix", "prompt"])
def test_an_adapter_outlives_its_injection(tiny, kind):
    model = tiny.model("t5")
    batch = tiny.batch("t5", tiny.rows(5, 3))
    adapter = tiny.adapter(model, kind, "a").freeze()
    activate(model, "a")
    outputs = tiny.logits(model, batch)
    eject(model)
    runtime(model).add("b", adapter)
    activate(model, "b")
    assert equal(tiny.logits(model, batch), outputs)
    twin = tiny.model("t5")
    runtime(twin).add("c", adapter)  # one adapter on two models at once
    activate(twin, ["c", None])
    activate(model, "b")
    assert near(tiny.logits(twin, batch)[:1], outputs[:1])
    assert equal(tiny.logits(model, batch), outputs)


def test_freezing_and_loading_while_active_take_effect(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    for kind in ("dora", "prefix", "lora"):
        adapter = tiny.adapter(model, kind, "a")
        activate(model, "a")
        model(**batch)
        best = {k: v.clone() for k, v in adapter.state().items()}
        at_best = tiny.logits(model, batch)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
        adapter.freeze()
        moved = tiny.logits(model, batch)
        assert not near(moved, at_best, 0.05), kind
        activate(model, "a")
        assert near(tiny.logits(model, batch), moved), kind
        adapter.load_state(best)  # best kept: into a frozen adapter that is active
        assert near(tiny.logits(model, batch), at_best), kind
        activate(model, "a")
        assert near(tiny.logits(model, batch), at_best), kind


def test_a_router_may_learn_the_weights(tiny):
    """Weights with a gradient over frozen adapters: several backward passes, and none is cut off by a zero."""
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    for i, kind in enumerate(("lora", "ia3", "bottleneck", "bias")):
        tiny.adapter(model, kind, kind, seed=i).freeze()
    logits = torch.zeros(2, 4, requires_grad=True)
    for _ in range(2):
        gates = logits.softmax(-1)
        gates = gates * torch.tensor([[1.0, 1, 1, 1], [0.0, 1, 1, 1]])
        activate(
            model,
            "lora + ia3 + bottleneck + bias",
            weights=dict(zip(("lora", "ia3", "bottleneck", "bias"), gates.T, strict=True)),
        )
        for _ in range(2):
            model(**batch).logits.square().mean().backward(retain_graph=True)
    assert (logits.grad.abs() > 0).all()


def test_names_that_modules_use_themselves(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    seen = []
    for i, name in enumerate(["train", "update", "keys", "ns/name@1.2.0", "a.b", "forward", "0"]):
        tiny.adapter(model, "lora", name, seed=i).freeze()
        activate(model, f'"{name}"')
        seen.append(tiny.logits(model, batch))
    assert not any(near(a, b, 0.01) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_one_adapter_under_two_names(tiny, kind):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    adapter = tiny.adapter(model, kind, "one").freeze()
    runtime(model).add("two", adapter)
    activate(model, "one")
    first = tiny.logits(model, batch)
    activate(model, "two")
    assert equal(tiny.logits(model, batch), first)
    activate(model, ["one", "two"])
    assert near(tiny.logits(model, batch), first)


# -- calls ---------------------------------------------------------------------------------------------------------


def test_a_call_that_fails_leaves_the_next_one_whole(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, "prompt", "a").freeze()
    tiny.adapter(model, "prompt", "b", size=1).freeze()
    activate(model, ["a", "b"])
    outputs = tiny.logits(model, batch)
    three = tiny.batch("llama", tiny.rows(5, 3, 4))
    for _ in range(2):
        with pytest.raises(KindError, match="2 rows and the batch has 3"):
            model(**three)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((2, 4), 10_000))
    assert equal(tiny.logits(model, batch), outputs)

    class Stop(BaseException):
        """As a KeyboardInterrupt: it does not pass by the hooks."""

    def stop(*_):
        raise Stop

    handle = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(Stop):
        model(**batch)
    handle.remove()
    assert equal(tiny.logits(model, batch), outputs)


def test_through_the_backbone(tiny):
    for family in ("llama", "gpt2", "bert", "opt"):
        model = tiny.model(family)
        batch = tiny.batch(family, tiny.rows(5, 3))
        tiny.adapter(model, "prompt", "p").freeze()
        tiny.adapter(model, "lora", "l").freeze()
        activate(model, ["p + l", "l"])
        with torch.no_grad():
            outer = model(**batch, output_hidden_states=True)
            inner = model.base_model(**batch)
        assert inner.last_hidden_state.shape == (2, 5, 32)
        mask = batch["attention_mask"].bool()
        assert near([inner.last_hidden_state[mask]], [outer.hidden_states[-1][mask]]), family


def test_weights_per_token_fit_the_call(tiny):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 5))
    for kind in ("lora", "bottleneck", "ia3", "prefix"):
        tiny.adapter(model, kind, "a").freeze()
        activate(model, "a", weights={"a": torch.rand(2, 5)})
        tiny.logits(model, batch)
        activate(model, "a", weights={"a": torch.rand(2, 4)})
        with pytest.raises(KindError, match="4 tokens"):
            model(**batch)
        with pytest.raises(KindError, match="4 tokens"):
            model(input_ids=batch["input_ids"][:, :1])


# -- 8-bit bases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bias", "bottleneck", "prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_on_an_int8_base(tiny, family, kind):
    model = tiny.model(family, "int8")
    rows = tiny.rows(5, 3, 4)
    batch = tiny.batch(family, rows)
    bare = tiny.logits(model, batch)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    fresh = tiny.adapter(model, kind, "a", noise=0.0)
    activate(model, "a")
    if fresh.identity_at_init:
        assert equal(tiny.logits(model, batch), bare)
    adapter = tiny.adapter(model, kind, "a")
    activate(model, "a")
    model(**batch).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.freeze()
    alone = []
    for row, expr in zip(rows, ["a", None, "a"], strict=True):
        activate(model, expr)
        alone += tiny.logits(model, tiny.batch(family, [row]))
    assert not near(alone[:1], bare[:1], 0.05)
    activate(model, ["a", None, "a"])
    assert near(tiny.logits(model, batch), alone, 5e-2)
    eject(model)
    assert equal(tiny.logits(model, batch), bare)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
