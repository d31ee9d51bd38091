"""What each method promises beyond learning: the invariants of the papers, and a new method in one short class."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import compose
from hub.cli import main
from hub.ref import AdapterRef
from hub.store import Store
from train.data.batches import Dataset, Ragged
from train.errors import ConfigError, DataError
from train.learner.reparametrize import attribute, function
from train.learner.sparsify import largest, places
from train.loop import fit
from train.method import Composite, Method, get_method, make_method, register
from train.methods import adamix, diff_pruning, lst, s4
from train.results.publish import publish_learned
from train.steps.objective import forward, loss_sum


def toy_rows(rows=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 49, (rows,), generator=random).tolist()
    ids = [[4 + (s + 3 * i) % 49 for i in range(5 + k % 4)] for k, s in enumerate(starts)]
    return Dataset({"input_ids": Ragged.of(ids)}, "causal_lm", pad_id=1)


def begun(tiny, config, name, options=None, **changes):
    method, run = make_method(config(method=name, options=options or {}, **changes))
    layers = {"num_hidden_layers": 4} if name == "s4" else {}
    model = tiny.model("llama", **layers)
    return model, method.build(model, seed=1), method, run


# -- AdaMix ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "copied"),
    [("up", {"down", "down_b"}), ("down", {"up", "up_b"}), ("none", {"down", "down_b", "up", "up_b"})],
)
def test_adamix_stores_the_mean_of_what_is_not_shared(tiny, config, share, copied):
    options = {"copies": 3, "bottleneck_size": 4, "share": share}
    model, learner, method, run = begun(tiny, config, "adamix", options, duration=4)
    fit(model, learner, toy_rows(), None, run, method=method)
    trained = {n: p.detach().clone() for n, p in learner.named_parameters()}
    stored = method.finish(model, learner)
    for path in stored.paths:
        for name in ("down", "down_b", "up", "up_b"):
            key = attribute(path, name)
            if name not in copied:
                assert torch.equal(stored.at(path, name), trained[key])
                continue
            stack = trained[f"parametrizations.{key}.original"]
            assert stack.shape[0] == 3
            assert torch.equal(stored.at(path, name), stack.mean(0))
            assert not torch.equal(stack[0], stack[1])


def test_adamix_of_one_copy_is_the_adapter(tiny, config):
    one, plain = (begun(tiny, config, n, {**o, "bottleneck_size": 4}, duration=4) for n, o in
                  (("adamix", {"copies": 1}), ("pfeiffer", {})))  # fmt: skip
    for made in (one, plain):
        fit(made[0], made[1], toy_rows(), None, made[3], method=made[2])
    for ours, theirs in zip(one[2].finish(*one[:2]).state().values(), plain[1].state().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adamix_pulls_two_passes_together_with_targets_held_constant():
    p, q = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q, -1)
    loss = adamix._divergence(log_p, log_q)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert p.grad is None
    assert q.grad.abs().sum() > 0


# -- SoRA ------------------------------------------------------------------------------------------------------------


def test_sora_shrinks_every_gate_by_xi_through_zero_to_zero(tiny, config):
    model, learner, method, run = begun(tiny, config, "sora", {"r": 4, "sparsity": 3.0})
    gate = function(learner, learner.paths[0], "A").g
    xi = 3.0 * 0.1
    with torch.no_grad():
        gate.copy_(torch.tensor([1.5 * xi, -1.5 * xi, 0.5 * xi, -4.0]))  # (xi, 2 xi) is where others go wrong
    optimizer = torch.optim.SGD(method.groups(learner, run), lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups if g.get("gates")] == [0.0]
    method.start(learner, optimizer, 1)
    method.after_step(learner, 0)
    torch.testing.assert_close(gate.detach(), torch.tensor([0.5 * xi, -0.5 * xi, 0.0, xi - 4.0]))


def test_sora_drops_ranks_without_changing_the_map(tiny, config):
    model, learner, method, run = begun(tiny, config, "sora", {"r": 4, "lora_alpha": 8.0})
    with torch.no_grad():
        for i, path in enumerate(learner.paths):
            learner.at(path, "B").normal_()
            function(learner, path, "A").g.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]) * (torch.arange(4) > i))
    batch = tiny.batch("llama", tiny.rows(5, 3))
    before = tiny.logits(model, batch)
    stored = method.finish(model, learner)
    assert stored.kind == "lora"
    assert [len(stored.at(path, "A")) for path in stored.paths] == [3, 2, 1]  # the fourth site has no rank left
    for ours, theirs in zip(tiny.logits(model, batch), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# -- sparse methods --------------------------------------------------------------------------------------------------


def test_the_largest_k_with_ties_are_never_more_than_k():
    values = {("a", "weight"): torch.ones(10, 10), ("b", "bias"): torch.full((50,), -1.0)}
    masks = largest(values, 0.1)
    assert sum(int(mask.sum()) for mask in masks.values()) == 15


def test_lt_sft_leaves_all_else_bit_equal_under_weight_decay_and_momentum(tiny, config):
    options = {"density": 0.02, "first": 0.5}
    model, learner, method, run = begun(tiny, config, "lt_sft", options, duration=8, weight_decay=0.5)
    fit(model, learner, toy_rows(), None, run, method=method)
    whole = sum(getattr(learner, attribute(*place)).numel() for place in places(learner))
    deltas = {place: getattr(learner, attribute(*place)).detach() for place in places(learner)}
    moved = sum(int((delta != 0).sum()) for delta in deltas.values())
    assert 0 < moved <= int(0.02 * whole)
    stored = method.finish(model, learner)
    assert sum(v.numel() for k, v in stored.state().items() if k.endswith("values")) == moved
    for (path, name), delta in deltas.items():
        spread = torch.zeros(delta.numel())
        spread[stored.at(path, f"{name}_at").long()] = stored.at(path, name).detach()
        assert torch.equal(spread.view_as(delta), delta)


def test_diff_pruning_counts_its_gates_in_closed_form_and_ends_exactly_sparse(tiny, config):
    gate = diff_pruning.HardConcrete(torch.Size([4000]), 0.3)
    shift = math.log(1.0)
    expected = 4000 * torch.sigmoid(torch.tensor(0.3 - shift)) * torch.sigmoid(torch.tensor(0.3 - shift))
    torch.testing.assert_close(gate.expected(), expected)
    torch.manual_seed(0)
    open_ = torch.stack([(gate.gate(gate.alpha) > 0).float().mean() for _ in range(50)]).mean()
    assert float(open_) == pytest.approx(float(torch.sigmoid(torch.tensor(0.3))), abs=0.01)

    options = {"density": 0.03, "first": 0.5}
    model, learner, method, run = begun(tiny, config, "diff_pruning", options, duration=6)
    fit(model, learner, toy_rows(), None, run, method=method)
    whole = sum(getattr(learner, attribute(*place)).numel() for place in places(learner))
    stored = method.finish(model, learner)
    kept = sum(v.numel() for k, v in stored.state().items() if k.endswith("values"))
    assert 0.9 * int(0.03 * whole) <= kept <= int(0.03 * whole)  # one that trained to exactly zero is not stored


# -- the others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lst", "attention_fusion"])
def test_no_gradient_enters_the_backbone(tiny, config, name):
    model, learner, method, _ = begun(tiny, config, name)
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(True)
    batch = toy_rows().batch(torch.arange(4))
    model.train()
    learner.train()
    method.loss(model, batch, "causal_lm").backward()
    assert all(p.grad is None for p in model.model.layers.parameters())
    assert any(p.grad is not None for p in learner.parameters())


def test_s4_gives_every_layer_about_the_same(tiny, config):
    _, learner, _, _ = begun(tiny, config, "s4", {"per_layer": 1600})
    assert isinstance(learner, Composite)
    per = [0.0] * 4
    for member in learner.members.values():
        layers = member.config.layers
        for layer in layers:
            per[layer] += sum(p.numel() for p in member.parameters()) / len(layers)
    assert max(per) < 1.06 * min(per), per
    assert [len(group) for group in s4.spindle(12)] == [2, 4, 4, 2]


def test_bitfit_moves_biases_alone(tiny, config):
    model, learner, _, _ = begun(tiny, config, "bitfit")
    assert all(p.dim() == 1 for p in learner.parameters())
    assert set(learner.state()) == {f"base_model.model.{path}.bias_delta" for path in learner.paths}


@pytest.mark.parametrize(("name", "extra"), [("prefix", "second"), ("p_tuning", "lstm")])
def test_what_makes_a_prompt_trains_and_is_not_stored(tiny, config, name, extra):
    model, learner, method, _ = begun(tiny, config, name, {"hidden": 8, "num_virtual_tokens": 3})
    assert any(extra in n for n, _ in learner.named_parameters())
    batch = tiny.batch("llama", tiny.rows(5, 3))
    before = tiny.logits(model, batch)
    stored = method.finish(model, learner)
    assert list(stored.state()) == ["prompt_embeddings"]
    for ours, theirs in zip(tiny.logits(model, batch), before, strict=True):
        assert torch.equal(ours, theirs)


def test_mam_makes_its_prefix_by_an_mlp_that_is_not_stored(tiny, config):
    model, learner, method, _ = begun(tiny, config, "mam", {"hidden": 8, "prefix_length": 3, "bottleneck_size": 4})
    assert any("second" in n for n, _ in learner.named_parameters())
    batch = tiny.batch("llama", tiny.rows(5, 3))
    before = tiny.logits(model, batch)
    stored = method.finish(model, learner)
    assert list(stored.members["prefix"].state()) == ["prompt_embeddings"]
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), before, strict=True))


def test_the_same_tokens_make_the_same_prompt(tiny, config):
    """A row's own prompt, whatever else is in the batch; and far fewer parameters than the table has."""
    model, learner, _, _ = begun(tiny, config, "ipt", {"num_virtual_tokens": 3, "generator_width": 4})
    assert sum(p.numel() for p in learner.parameters()) < model.get_input_embeddings().weight.numel() / 4
    rows = tiny.rows(5, 4)
    twins = [torch.cat([rows[0][:3], torch.tensor([9, 11])]), rows[0], rows[1]]
    prompt = learner.prompt()
    made = prompt.of(torch.stack([row[:3] for row in twins]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    alone = tiny.logits(model, tiny.batch("llama", [rows[0]]))[0]
    torch.testing.assert_close(tiny.logits(model, tiny.batch("llama", twins))[1], alone, rtol=1e-5, atol=1e-5)


def test_pseudo_tokens_stand_where_the_text_has_slots(tiny, config, tokenizer):
    slot = next(w for w in tokenizer.get_vocab() if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1)
    options = {"num_virtual_tokens": 2, "hidden": 8, "slot": slot}
    method, run = make_method(config(method="p_tuning", options=options))
    model = tiny.model("llama", vocab_size=len(tokenizer))
    learner = method.build(model, tokenizer=tokenizer)
    (at,) = tokenizer(slot, add_special_tokens=False)["input_ids"]
    others = [i for i in range(4, 12) if i != at]
    ids = torch.tensor([[others[0], at, others[1], others[2], at, others[3]]])
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    out = model(input_ids=ids).logits
    assert out.shape[1] == ids.shape[1]  # nothing was put in front
    prompt = learner.at("", "P").detach()
    plain = model.get_input_embeddings().weight[ids[0]].detach()
    assert torch.equal(seen[0][0, [1, 4]], prompt)
    assert torch.equal(seen[0][0, [0, 2, 3, 5]], plain[[0, 2, 3, 5]])
    out.square().mean().backward()
    assert all(p.grad is not None for p in learner.parameters())
    stored = method.finish(model, learner)
    assert stored.config.slot_token == at
    assert list(stored.state()) == ["prompt_embeddings"]
    with pytest.raises(ConfigError, match="not one token"):
        make_method(config(method="p_tuning", options={"slot": "two words"}))[0].build(model, tokenizer=tokenizer)
    assert run.method == "p_tuning"


def test_a_prompt_starts_from_words(tiny, config, tokenizer):
    method, _ = make_method(config(method="prompt", options={"num_virtual_tokens": 5, "init_text": "yes no"}))
    model = tiny.model("llama", vocab_size=len(tokenizer))
    prompt = method.build(model, tokenizer=tokenizer).at("", "P")
    ids = tokenizer("yes no", add_special_tokens=False)["input_ids"]
    turn = torch.tensor([ids[i % len(ids)] for i in range(5)])
    assert torch.equal(prompt, model.get_input_embeddings().weight[turn])


def test_qlora_fills_in_its_recipe_and_what_is_given_wins(config):
    _, run = make_method(config(method="qlora", lr=1e-4))
    assert (run.quantize, run.optimizer, run.clip, run.precision) == ("nf4", "paged_adamw_32bit", 0.3, "bf16")
    assert (run.lr, run.batch_size) == (1e-4, 8)
    assert (run.gradient_checkpointing, run.group_by_length, run.schedule) == (True, True, "constant")


def test_t_few_adds_three_losses(tiny, config, tokenizer):
    method, _ = make_method(config(method="t_few", options={"choices": [" yes", " no way"]}))
    model = tiny.model("llama", vocab_size=len(tokenizer))
    method.build(model, tokenizer=tokenizer)
    from train.data.datasets import completions

    data = completions(tokenizer, ["Is it?", "Well, is it not?"], [" yes", " no way"], 32)
    found = method.loss(model, data.batch(torch.arange(2)), "causal_lm")
    expected = 0.0
    for prompt, right in (("Is it?", 0), ("Well, is it not?", 1)):
        tokens, scores, unlikely, count = [], [], 0.0, 0
        for k, answer in enumerate((" yes", " no way")):
            row = completions(tokenizer, [prompt], [answer], 32).batch(torch.tensor([0]))
            logits = forward(model, row, "causal_lm")
            n = int((row["labels"] != -100).sum())
            log_p = F.log_softmax(logits[0], -1)[range(-n - 1, -1), row["labels"][0, -n:]]
            scores.append(log_p.mean())
            tokens.append(log_p)
            if k != right:
                unlikely, count = unlikely - torch.log1p(-log_p.exp()).sum(), count + n
        ranked = F.cross_entropy(torch.stack(scores)[None], torch.tensor([right]))
        expected = expected - tokens[right].sum() + len(tokens[right]) * (unlikely / count + ranked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = completions(tokenizer, ["Is it?"], [" perhaps"], 32)
    with pytest.raises(DataError, match="none of the choices"):
        method.loss(model, other.batch(torch.tensor([0])), "causal_lm")


def test_a_new_domain_starts_from_the_closest_expert(tiny, config, tmp_path):
    for name, seed in (("near", 0), ("far", 9)):
        model, learner, method, run = begun(tiny, config, "demix", {"r": 2}, duration=20)
        other = Dataset({"input_ids": Ragged.of([[5, 4, 5, 4, 5]] * 8)}, "causal_lm")
        data = toy_rows(seed=seed) if name == "near" else other
        result = fit(model, learner, data, None, run, method=method)
        ref = AdapterRef.parse(f"me/{name}@1.0")
        publish_learned(tmp_path / name, learner, model, run, result, ref=ref, store=Store(), data={})
    method, _ = make_method(config(method="demix", options={"r": 2, "start_from": ("me/far@1.0", "me/near@1.0")}))
    model = tiny.model("llama")
    learner = method.build(model, seed=5)
    method.warm(model, learner, toy_rows(seed=3))
    assert method.started_from == "me/near@1.0"
    compose.attach(model, "near", "me/near@1.0")
    near = compose.runtime.model_runtime.runtime(model).adapter("near").state()
    assert all(torch.equal(value, near[key]) for key, value in learner.state().items())


# -- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def new_method():
    """A method as a user would write it: LoRA+ (arXiv:2402.12354), B at a rate of its own."""

    @register("lora_plus")
    class LoraPlus(Method):
        """LoRA whose B learns sixteen times as fast as A. Stores A and B."""

        kind = "lora"
        paper = "arXiv:2402.12354"

        def groups(self, learner, config):
            """Two groups."""
            named = dict(learner.named_parameters())
            b = [p for n, p in named.items() if n.endswith(":B")]
            a = [p for n, p in named.items() if not n.endswith(":B")]
            return [{"params": a, "weight_decay": 0.0}, {"params": b, "weight_decay": 0.0, "lr_scale": 16.0}]

    yield LoraPlus
    from train import method

    del method.METHODS._known["lora_plus"]


def test_a_new_method_is_listed_trains_and_is_published(tiny, config, new_method, tmp_path):
    from click.testing import CliRunner

    listed = CliRunner().invoke(main, ["methods"])
    assert listed.exit_code == 0, listed.output
    assert "lora_plus" in listed.output
    model, learner, method, run = begun(tiny, config, "lora_plus", {"r": 2}, duration=10, lr=2e-3)
    result = fit(model, learner, toy_rows(), None, run, method=method)
    plain = begun(tiny, config, "lora", {"r": 2}, duration=10, lr=2e-3)
    slower = fit(plain[0], plain[1], toy_rows(), None, plain[3], method=plain[2])
    assert result.history[-1]["loss"] < slower.history[-1]["loss"] - 0.05
    ref = AdapterRef.parse("me/plus@1.0")
    artifact = publish_learned(tmp_path / "p", learner, model, run, result, ref=ref, store=Store(), data={})
    assert (artifact.manifest.kind, artifact.manifest.method) == ("lora", "lora_plus")
    assert loss_sum is not None


def test_unknown_methods_and_options_are_told_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown method 'housby'; did you mean houlsby"):
        get_method("housby")


def test_an_unknown_option_names_those_of_method_and_kind(tiny, config):
    with pytest.raises(ConfigError, match="method 'sora' has no option 'sparsty', did you mean 'sparsity'") as caught:
        begun(tiny, config, "sora", {"sparsty": 1})
    assert "lora_alpha" in caught.value.hint
    with pytest.raises(ConfigError, match="method 'adamix', option copies"):
        make_method(config(method="adamix", options={"copies": 0}))


def test_a_ladder_starts_as_a_pruned_copy_of_the_blocks(tiny, config):
    model, learner, method, _ = begun(tiny, config, "lst", {"reduction_factor": 4})
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "moduloom" not in name}
    method.warm(model, learner, toy_rows())
    chosen = learner.at("", "in").argmax(1)
    assert torch.equal(learner.at("", "in").sum(1), torch.ones(8))
    up, inner = learner.at("", "1.up"), model.model.layers[1].mlp.up_proj.weight[:, chosen]
    assert all(any(torch.equal(row, other) for other in inner) for row in up)
    down, whole = learner.at("", "1.down"), model.model.layers[1].mlp.down_proj.weight[chosen]
    assert all(any(torch.equal(column, other) for other in whole.T) for column in down.T)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in before.items())
    assert not any(p.requires_grad for p in model.model.layers.parameters())


def test_squared_gradients_are_summed_row_by_row_and_none_is_kept():
    weight, rows = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False), torch.randn(5, 4)
    with lst._squared_gradients([weight]) as sums:
        for x in rows:
            (weight @ x).square().sum().backward()
            assert weight.grad is None
    expected = sum((2 * torch.outer(weight @ x, x)).square() for x in rows)
    torch.testing.assert_close(sums[weight].rows, expected.sum(0))
    torch.testing.assert_close(sums[weight].columns, expected.sum(1))
    assert not weight.requires_grad


def test_a_run_that_ends_before_it_chose_still_stores_k_weights(tiny, config):
    model, learner, method, run = begun(tiny, config, "lt_sft", {"density": 0.02, "first": 0.9}, duration=20)
    fit(model, learner, toy_rows(), None, run, method=method, seconds=1e-9)
    whole = sum(getattr(learner, attribute(*place)).numel() for place in places(learner))
    stored = method.finish(model, learner)
    assert 0 < sum(v.numel() for k, v in stored.state().items() if k.endswith("values")) <= int(0.02 * whole)
