"""What is saved of a model with adapters in it is the base, under the base's own names, and loads as such."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
import transformers

import compose
from compose.base.model import identity_of
from compose.base.quantization import keep_differentiable
from compose.kind.registry import kinds
from compose.runtime.model_runtime import activate, eject, runtime

KINDS = sorted(kinds())
HEADED = {"head"}


def injected(tiny, family, kind, *, active=True, dtype="fp32", **options):
    """A model with a frozen adapter at work, and what the bare one says."""
    model = tiny.model(family, dtype, task="classification" if kind in HEADED else "lm", **options)
    batch = tiny.batch(family, tiny.rows(5, 3))
    bare = tiny.logits(model, batch)
    tiny.adapter(model, kind, "a").freeze()
    activate(model, "a")
    changed = tiny.logits(model, batch)
    assert any(not torch.allclose(x, y, atol=1e-3) for x, y in zip(changed, bare, strict=True))
    activate(model, "a" if active else None)
    return model, batch, bare, changed


def loaded(model, place, **options):
    again, report = type(model).from_pretrained(place, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return again.eval()


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_the_base(tiny, close, tmp_path, kind, active):
    family = "bert" if kind in HEADED else "llama"
    model, batch, bare, _ = injected(tiny, family, kind, active=active)
    model.save_pretrained(tmp_path)
    close(tiny.logits(loaded(model, tmp_path), batch), bare)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "t5", "opt", "gpt_neox", "qwen2"])
def test_families_with_tied_and_fused_weights(tiny, close, tmp_path, family):
    tied = {} if family == "t5" else {"tie_word_embeddings": True}
    model, batch, bare, _ = injected(tiny, family, "dense", **tied)
    tiny.adapter(model, "lora", "l", target_modules="all-linear").freeze()
    activate(model, "a >> l")
    model.save_pretrained(tmp_path)
    again = loaded(model, tmp_path)
    close(tiny.logits(again, batch), bare)
    bare_model = tiny.model(family, **tied)
    assert set(model.state_dict()) == set(bare_model.state_dict())
    names = [name for name, _ in model.named_parameters() if not name.startswith("moduloom_adapters")]
    assert names == [name for name, _ in bare_model.named_parameters()]


def test_in_shards(tiny, close, tmp_path):
    model, batch, bare, _ = injected(tiny, "llama", "lora")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 3
    close(tiny.logits(loaded(model, tmp_path), batch), bare)


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_of_a_quantized_base(tiny, tmp_path, dtype):
    model, batch, bare, _ = injected(tiny, "llama", "lora", dtype=dtype)
    model.save_pretrained(tmp_path)
    again = loaded(model, tmp_path)
    keep_differentiable(again)  # as compose.load does
    for x, y in zip(tiny.logits(again, batch), bare, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_a_state_dict_of_the_bare_base_goes_into_an_injected_one(tiny, close):
    """Other weights of the base under its own names: what an adapter has laid out of the old ones is made anew."""
    other = tiny.model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.25
    batch = tiny.batch("llama", tiny.rows(5, 3))
    model = tiny.model("llama")
    for kind in ("lora", "dora", "ia3", "bias"):
        state = tiny.adapter(model, kind, kind).freeze().state()
        tiny.adapter(other, kind, kind).freeze().load_state(state)
    activate(model, "lora >> dora >> ia3 >> bias")
    before = tiny.logits(model, batch)
    model.load_state_dict(other.state_dict())
    activate(other, "lora >> dora >> ia3 >> bias")
    after = tiny.logits(model, batch)
    close(after, tiny.logits(other, batch))
    assert not torch.allclose(after[0], before[0], atol=1e-2)


def test_through_a_module_around_the_model(tiny, close):
    """As SentenceTransformer and Lightning hold one."""
    model, batch, bare, changed = injected(tiny, "bert", "lora")
    around = torch.nn.Sequential(torch.nn.Identity(), model)
    state = around.state_dict()
    plain = torch.nn.Sequential(torch.nn.Identity(), tiny.model("bert"))
    plain.load_state_dict(state)
    close(tiny.logits(plain[1], batch), bare)
    around.load_state_dict(plain.state_dict())
    close(tiny.logits(model, batch), changed)


# -- adapters that train are part of the state -----------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_that_trains_and_no_other(tiny, close):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    frozen = tiny.adapter(model, "lora", "frozen").freeze()
    learning = tiny.adapter(model, "dora", "learning", seed=2)
    activate(model, "frozen >> learning")
    expected = tiny.logits(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    extra = {name for name in state if name.startswith("moduloom_adapters.")}
    assert len(extra) == len(list(learning.parameters()))
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter += 0.5
    assert not torch.allclose(tiny.logits(model, batch)[0], expected[0], atol=1e-2)
    model.load_state_dict(state)
    close(tiny.logits(model, batch), expected)
    with pytest.raises(RuntimeError, match="learning"):
        model.load_state_dict({k: v for k, v in state.items() if k not in extra})  # not lost without a word
    learning.freeze()
    assert not any(name.startswith("moduloom_adapters.") for name in model.state_dict())
    with torch.no_grad():
        for parameter in (*learning.parameters(), *frozen.parameters()):
            parameter.mul_(2)
    model.load_state_dict({k: v for k, v in state.items() if k not in extra})
    assert not torch.allclose(tiny.logits(model, batch)[0], expected[0], atol=1e-2), "a frozen one stays what it is"


def test_a_trainer_of_transformers_goes_on_from_its_checkpoint(tiny, close, tmp_path):
    def trainer(model, steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            learning_rate=0.05,
            disable_tqdm=True,
            lr_scheduler_type="constant",
            label_names=["labels"],
        )
        rows = [{"input_ids": row, "labels": row} for row in tiny.rows(*[6] * 12)]
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    def fresh():
        model = tiny.model("llama")
        compose.create(model, "lora", {"r": 2}, name="a")
        activate(model, "a")
        return model

    batch = tiny.batch("llama", tiny.rows(5, 3))
    whole = fresh()
    trainer(whole, 4).train()
    half = fresh()
    trainer(half, 2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = fresh()
    trainer(resumed, 4).train(resume_from_checkpoint=str(checkpoint))
    whole.eval(), resumed.eval(), half.eval()
    close(tiny.logits(resumed, batch), tiny.logits(whole, batch))
    assert not torch.allclose(tiny.logits(half, batch)[0], tiny.logits(whole, batch)[0], atol=1e-4)
    assert identity_of(checkpoint).weights == compose.identity(whole).weights
    base, report = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    close(tiny.logits(base.eval(), batch), tiny.logits(tiny.model("llama"), batch))


# -- whole models ----------------------------------------------------------------------------------------------------


def _saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _saved_whole, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_whole_model_is_one_of_its_own(tiny, close, kind, how):
    family = "bert" if kind in HEADED else "llama"
    model, batch, bare, changed = injected(tiny, family, kind)
    twin = COPIES[how](model)
    close(tiny.logits(twin, batch), changed)
    adapter = runtime(twin).adapters["a"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(-2)
    assert any(not torch.allclose(x, y, atol=1e-3) for x, y in zip(tiny.logits(twin, batch), changed, strict=True))
    close(tiny.logits(model, batch), changed)
    adapter.load_state({key: value.clone() for key, value in runtime(model).adapters["a"].state().items()})
    close(tiny.logits(twin, batch), changed)
    eject(twin)
    close(tiny.logits(twin, batch), bare)
    close(tiny.logits(model, batch), changed)


def test_of_a_copied_prompt_generator_the_table_is_the_copys(tiny, close):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, "prompt", "a", instance="mlp").freeze()
    activate(model, "a")
    expected = tiny.logits(model, batch)
    for how in COPIES.values():
        twin = how(model)
        with torch.no_grad():
            twin.get_input_embeddings().weight.mul_(3)
        close(tiny.logits(model, batch), expected)
        assert not torch.allclose(tiny.logits(twin, batch)[0], expected[0], atol=1e-2)


def test_what_others_wrap_around_a_layer_stays_in_place(tiny, close):
    """As accelerate does, before and after."""
    accelerate = pytest.importorskip("accelerate.hooks")
    calls = []

    class Counts(accelerate.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    bare = tiny.logits(model, batch)
    layer, other = model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.q_proj
    accelerate.add_hook_to_module(layer, Counts())
    tiny.adapter(model, "lora", "a").freeze()
    activate(model, "a")
    changed = tiny.logits(model, batch)
    assert calls == [layer]
    accelerate.add_hook_to_module(other, Counts())
    close(tiny.logits(model, batch), changed)
    assert calls == [layer, layer, other]
    accelerate.remove_hook_from_module(layer)  # puts back the forward it found, which was not ours
    activate(model, "a")
    close(tiny.logits(model, batch), changed)
    eject(model)
    close(tiny.logits(model, batch), bare)
    accelerate.remove_hook_from_module(other)
    close(tiny.logits(model, batch), bare)


def test_eject_leaves_no_trace(tiny):
    model, reference = tiny.model("t5"), tiny.model("t5")
    for kind in ("lora", "prefix", "prompt", "ladder", "dense"):
        tiny.adapter(model, kind, kind).freeze()
    activate(model, "lora >> prefix >> prompt >> ladder >> dense")
    tiny.logits(model, tiny.batch("t5", tiny.rows(5, 3)))
    eject(model)
    for (name, one), (_, other) in zip(model.named_modules(), reference.named_modules(), strict=True):
        assert one.__dict__.keys() == other.__dict__.keys(), name
        assert "forward" not in one.__dict__
        assert not one._forward_hooks and not one._forward_pre_hooks
    assert model.config._attn_implementation == reference.config._attn_implementation


@pytest.mark.parametrize("before", [True, False])
def test_what_accelerate_wraps_around_the_model(tiny, request, before):
    """Mixed precision wraps the model's forward, and unwrapping binds what it finds there to the model once more."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test's has another precision
    request.addfinalizer(lambda: accelerate.state.AcceleratorState._reset_state(reset_partial_state=True))
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    if before:
        model = accelerator.prepare(model)
    tiny.adapter(model, "prompt", "p").freeze()
    tiny.adapter(model, "lora", "a").freeze()
    activate(model, "p >> a")
    if not before:
        whole = tiny.logits(model, batch)
        model = accelerator.prepare(model)
        half = tiny.logits(model, batch)
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), whole, strict=True))
    else:
        half = tiny.logits(model, batch)
        whole = tiny.logits(accelerator.unwrap_model(model, keep_fp32_wrapper=False), batch)
    assert all(x.dtype == torch.float32 for x in half)
    for x, y in zip(half, whole, strict=True):
        torch.testing.assert_close(x, y, atol=0.2, rtol=0.2)
    eject(model)
    bare = tiny.logits(model, batch)
    tiny.adapter(model, "prefix", "x").freeze()
    activate(model, "x")
    for _ in range(2):
        assert not torch.allclose(tiny.logits(model, batch)[0], bare[0], atol=0.05)
