"""Dense and sparse deltas: they are other weights, whatever holds the base's; bad indices are refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from compose.errors import KindError
from compose.formats.directory import read_adapter, save_adapter
from compose.merging.fold import fold
from compose.runtime.model_runtime import activate, eject, runtime
from compose.slots.slot import moved


def write_in(model, adapter):
    """Add the deltas to the base's own parameters."""
    with torch.no_grad():
        for path in adapter.paths:
            module = model.get_submodule(path)
            for name, parameter in module.named_parameters(recurse=False):
                owner = adapter.own(path, name)
                if owner != (path, name):
                    continue  # tied: moved where it is kept
                linear = name == "weight" and not isinstance(module, torch.nn.Embedding) and parameter.dim() == 2
                delta = adapter.map_at(*owner).dense() if linear else adapter.vector_at(*owner)
                parameter += delta.T if isinstance(module, Conv1D) and name == "weight" else delta


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_all_parameters_that_move_are_other_weights(tiny, close, family, kind):
    """Linears, norms, tied embeddings and all: as if the checkpoint itself had been fine-tuned."""
    model = tiny.model(family)
    adapter = tiny.adapter(model, kind, "a", target_modules="all", noise=0.1)
    batch = tiny.batch(family, tiny.rows(5, 3))
    activate(model, "0.5 * a")
    half = tiny.logits(model, batch)
    adapter.freeze()
    close(half, tiny.logits(model, batch))
    activate(model, "a")
    ours = tiny.logits(model, batch)
    tuned = tiny.model(family)
    write_in(tuned, adapter)
    close(ours, tiny.logits(tuned, batch), factor=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_training_costs_what_it_costs_without_us(tiny, close, family):
    """The gradients of a delta are those of the weights it moves, by as many multiplications."""
    model = tiny.model(family)
    adapter = tiny.adapter(model, "dense", "a", target_modules="all", noise=0.1)
    batch, tuned = tiny.batch(family, tiny.rows(5, 3)), tiny.model(family)
    write_in(tuned, adapter)
    activate(model, "a")
    counts = []
    for each in (model, tuned):
        with FlopCounterMode(display=False) as counter:
            each(**batch).logits.square().mean().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]  # less where a position table stays as it is
    for path in adapter.paths:
        module = tuned.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            if adapter.own(path, name) == (path, name):
                theirs = parameter.grad.T if isinstance(module, Conv1D) and name == "weight" else parameter.grad
                assert (adapter.at(path, name).grad - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_a_delta_is_not_rounded_into_a_base_of_another_precision(tiny, dtype):
    """W x + D x: a step far below the precision of W still moves the outputs."""
    model = tiny.model("llama", dtype)
    adapter = tiny.adapter(model, "dense", "a", target_modules=["down_proj"], layers=[1], noise=0.0)
    (path,) = adapter.paths
    slot_of = runtime(model)
    activate(model, "a")
    x = torch.eye(48, dtype=model.dtype)[None]
    before = slot_of.slot(path)(x)
    with torch.no_grad():
        adapter.at(path, "weight").fill_(1e-5)
    slot_of.refresh()
    slot = slot_of.slot(path)
    assert moved(slot.layer, *slot.program.moves) is None
    assert not torch.equal(slot(x), before)


def test_partial_freezing_leaves_the_lower_layers_alone(tiny):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "dense", "a", layers=[1])
    assert {p.split(".")[2] for p in adapter.paths} == {"1"}
    activate(model, "a")
    states = model(**tiny.batch("llama", tiny.rows(4)), output_hidden_states=True).hidden_states
    assert not states[1].requires_grad  # no graph below: neither memory nor work


def test_biases_can_stay(tiny):
    adapter = tiny.adapter(tiny.model("bert"), "dense", "a", biases=False, target_modules="all-linear")
    assert all(key.endswith("weight_delta") for key in adapter.state())


def test_chosen_places_move_and_no_other(tiny, tmp_path):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "sparse", "a", target_modules=["q_proj"], layers=[0], noise=0.0)
    (path,) = adapter.paths
    places = torch.tensor([900, 3, 77])
    adapter.choose(path, "weight", places, torch.tensor([1.0, 2.0, 3.0]))
    delta = adapter.map_at(path, "weight").dense().flatten()
    assert delta.nonzero().flatten().tolist() == [3, 77, 900]
    assert delta[[3, 77, 900]].tolist() == [2.0, 3.0, 1.0]
    save_adapter(adapter, tmp_path, runtime(model).sites)  # three places, whatever the density of its config
    again = read_adapter(tmp_path, runtime(model).sites, model, name="b")
    assert torch.equal(again.map_at(path, "weight").dense().flatten(), delta)
    stored = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert stored < 1500


@pytest.mark.parametrize("indices", [[3, 3], [5, 2], [-1, 4], [4, 1024], [0.5, 1.5]])
def test_indices_from_outside_are_not_trusted(tiny, indices):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "sparse", "a", target_modules=["q_proj"], layers=[0])
    state = adapter.state()
    places, values = adapter.key(adapter.paths[0], "weight_at"), adapter.key(adapter.paths[0], "weight")
    broken = {**state, places: torch.tensor(indices), values: torch.ones(2)}
    with pytest.raises(KindError, match="weight_indices of adapter 'a'"):
        adapter.load_state(broken)
    assert all(torch.equal(v, state[k]) for k, v in adapter.state().items())


def test_masked_tuning_moves_nothing_else(tiny):
    """Weight decay and momentum do not reach a weight outside the mask, because it is no parameter."""
    model = tiny.model("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter = tiny.adapter(model, "sparse", "a", noise=0.0)
    activate(model, "a")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(**tiny.batch("llama", tiny.rows(5))).logits.square().mean().backward()
        optimizer.step()
    eject(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_norms_and_embeddings_are_folded_too(tiny, close, family, kind):
    model = tiny.model(family)
    tiny.adapter(model, kind, "a", target_modules="all", noise=0.1).freeze()
    tiny.adapter(model, kind, "b", noise=0.1, seed=3, size=1).freeze()
    biased = [p for p in runtime(model).sites.norms if getattr(model.get_submodule(p), "bias", None) is not None]
    tiny.adapter(model, "bias", "c", noise=0.1, target_modules=None).freeze()
    batch = tiny.batch(family, tiny.rows(5, 3))
    other = "c" if biased else "b"  # a base without biases has no room for c
    for text in (f"0.5 * a + {other}", f"a >> (2 * {other} + a)", "0.5 * (b >> a) + b", "ties(a, b, density=1)"):
        activate(model, text)
        tuned = tiny.model(family)
        for part in fold(model, text):
            tuned.get_parameter(part.name).data.copy_(part.value)
        close(tiny.logits(tuned, batch), tiny.logits(model, batch), factor=5)
