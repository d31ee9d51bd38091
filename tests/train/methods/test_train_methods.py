"""Every registered method goes through the loop: it learns, stores what it should, reloads equal, resumes exactly."""

from __future__ import annotations

import json

import pytest
import torch

import compose
from compose.kind.adapter import Adapter
from compose.kind.registry import kinds
from hub.store import Store
from train.data.datasets import Splits
from train.dry_run import preview
from train.loop import fit
from train.method import Composite, make_method, methods, trained
from train.pipeline import PreparedRun
from train.results.publish import publish_learned
from train.steps.checkpoint import CHECKPOINT, read_checkpoint
from train.steps.evaluate import evaluate

# A kind that is a method only because no method has its name goes through test_train_kinds.py.
NAMES = sorted(name for name, cls in methods().items() if cls.__module__.startswith("train.methods."))
# Test-sized values of whatever options a method and its kind have.
SIZES = {"r": 4, "lora_alpha": 6.0, "num_virtual_tokens": 3, "bottleneck_size": 8, "hidden": 16, "prefix_length": 3}
SIZES |= {"copies": 2, "density": 0.05, "top": 1, "first": 0.4, "alpha_init": 1.0, "sparsity": 2.0}
STEPS = {"lt_sft": 40, "diff_pruning": 40}  # two phases
RATE = {"lt_sft": 0.005, "diff_pruning": 0.005, "full": 0.005, "partial_freezing": 0.005, "dense": 0.005}
# What each stores, by the end of the keys (a head apart); other methods store their kind's own tensors.
STORED = {
    "prefix": {"prompt_embeddings"},
    "p_tuning": {"prompt_embeddings"},
    "prompt": {"prompt_embeddings"},
    "sora": {"lora_A.weight", "lora_B.weight"},
    "lora": {"lora_A.weight", "lora_B.weight"},
    "rslora": {"lora_A.weight", "lora_B.weight"},
    "qlora": {"lora_A.weight", "lora_B.weight"},
    "dora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    "adamix": {"down.weight", "down.bias", "up.weight", "up.bias"},
    "houlsby": {"down.weight", "down.bias", "up.weight", "up.bias"},
    "pfeiffer": {"down.weight", "down.bias", "up.weight", "up.bias"},
    "bitfit": {"bias_delta"},
    "ia3": {"ia3_l"},
    "lt_sft": {"weight_values", "weight_indices", "bias_values", "bias_indices"},
    "diff_pruning": {"weight_values", "weight_indices", "bias_values", "bias_indices"},
}


def options_of(name):
    cls = methods()[name]
    fields = {*cls.Options.model_fields, *(kinds()[cls.kind].Config.model_fields if cls.kind in kinds() else ())}
    return {key: value for key, value in SIZES.items() if key in fields}


def base(tiny, name):
    return tiny.model("llama", num_hidden_layers=4) if name == "s4" else tiny.model("llama")


def begun(tiny, config, name, data=None, **changes):
    """A fresh model with the method's learner in it, and the run's method and configuration."""
    changes = {"duration": STEPS.get(name, 30), "lr": RATE.get(name, 0.03), "precision": "fp32", **changes}
    run = config(method=name, options={**options_of(name), **changes.pop("options", {})}, **changes)
    method, run = make_method(run)
    model = base(tiny, name)
    learner = method.build(model, seed=3)
    if data is not None:
        method.warm(model, learner, data)
    return model, learner, method, run


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_what_is_published_does_the_same(tiny, data, config, name, tmp_path):
    train, held = data(0), data(1)
    model, learner, method, run = begun(tiny, config, name, train)
    frozen = {key: value.detach().clone() for key, value in model.state_dict().items() if "moduloom" not in key}
    before = evaluate(base(tiny, name), held)["loss"]
    result = fit(model, learner, train, held, run, method=method)
    assert result.best["loss"] < before - 0.03, f"{before} -> {result.best}"
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items() if key in after), "the base moved"

    batch = tiny.batch("llama", tiny.rows(5, 3, 6))
    learned = tiny.logits(model, batch)
    stored = method.finish(model, learner)
    for row, expected in zip(tiny.logits(model, batch), learned, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    artifact = publish_learned(
        tmp_path / "a", stored, model, run, result, ref=compose_ref(name), store=Store(), data={}, evaluated_on=held
    )
    assert artifact.manifest.method == name
    assert artifact.manifest.metrics[0].dataset_digest == held.digest
    members = stored.members.values() if isinstance(stored, Composite) else (stored,)
    for member in members:
        keys = {key.removeprefix("base_model.model.") for key in member.state(heads=False)}
        ends = {next((e for e in STORED.get(name, keys) if key.endswith(e)), None) for key in keys}
        assert ends <= STORED.get(name, ends) and None not in ends, keys
    other = base(tiny, name)
    reload(other, artifact)
    for row, expected in zip(tiny.logits(other, batch), learned, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def compose_ref(name):
    from hub.ref import AdapterRef

    return AdapterRef.parse(f"me/{name.replace('_', '-')}@1.0")


def reload(model, artifact):
    """Activate what was published, a composition member by member."""
    if artifact.manifest.type != "composition":
        compose.attach(model, "b", artifact)
        compose.activate(model, "b")
        return
    for need in artifact.manifest.requires:
        compose.attach(model, f"{need.name}@1.0", Store().get(f"{need.name}@1.0"))
    compose.activate(model, artifact.manifest.expression)


@pytest.mark.parametrize("name", NAMES)
def test_it_resumes_bit_for_bit(tiny, data, config, name, tmp_path, interrupt):
    """From the middle of a run, and from its end, when only what follows the training is left to be done."""
    values = {"duration": 6, "eval_every": 2, "schedule": "cosine"}
    straight, stopped, *resumed = (begun(tiny, config, name, data(0), **values) for _ in range(4))

    def train(made, **options):
        model, learner, method, run = made
        return fit(model, learner, data(0), data(1), run, method=method, **options)

    whole = train(straight)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, out=tmp_path, save_every=5, watch=interrupt(5))
    assert read_checkpoint(tmp_path / CHECKPOINT)["result"]["steps"] == 5
    for made in resumed:
        again = train(made, out=tmp_path, resume=True, save_every=5)
        assert again.best == whole.best
    ends = [dict(tensors(method.finish(model, learner))) for model, learner, method, _ in (straight, *resumed)]
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        assert all(torch.equal(value, other[key]) for key, value in ends[0].items())


@pytest.mark.parametrize("name", NAMES)
def test_its_cost_is_known_before_it_starts(tiny, data, config, name):
    rows = data(0)
    model, learner, method, run = begun(tiny, config, name, rows)
    found = preview(PreparedRun(model, learner, None, Splits(rows, None, {}), method, run)).as_dict()
    assert found["trainable"] == trained(learner) > 0
    assert all(value > 0 for value in found["memory"].values())
    assert (found["changed"] > 0) == any(not path.startswith("@") for path in found["sites"])
    assert json.dumps(found)


def tensors(stored: Adapter | Composite):
    members = stored.members.values() if isinstance(stored, Composite) else (stored,)
    return [(f"{m.name}: {key}", value) for m in members for key, value in m.state().items()]
