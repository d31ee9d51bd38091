"""Twenty steps of our loop against peft and bitsandbytes: the same initial values, batches and losses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import compose
from compose.base.location import locate
from train.config import TrainConfig
from train.data.batches import IGNORE, Dataset, Ragged, epoch_order
from train.data.datasets import text_blocks
from train.loop import fit
from train.method import make_method

peft = pytest.importorskip("peft", reason="parity is measured against peft")

STEPS, ROWS = 20, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peer(initial, quantize):
    """The built-in base in peft with our initial values."""
    options = {"dtype": torch.float32}
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(locate("builtin:tiny-lm").directory, **options)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    peft.set_peft_model_state_dict(model, initial)
    return model


def losses_of_peer(model, data, config):
    """What the transformers documentation would have one write: the model's own loss, AdamW, clipping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    order, losses = epoch_order(data, config.seed, 0, ROWS), []
    model.train()
    for step in range(STEPS):
        batch = data.batch(order[step * ROWS : (step + 1) * ROWS])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("quantize", "within"), [("none", 1e-4), ("nf4", 1e-3)])
def test_twenty_steps_equal_those_of_peft(tokenizer, quantize, within):
    texts = [f"Line {i}: def function_{i}(x): return x + {i % 13}  # the sum of two numbers" for i in range(130)]
    data = text_blocks(tokenizer, texts, 32)
    assert len(data) >= STEPS * ROWS
    config = TrainConfig(duration=STEPS, batch_size=ROWS, lr=3e-3, schedule="constant", warmup=0.0)
    model = compose.load("builtin:tiny-lm", quantize=quantize, dtype="fp32")
    options = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
    adapter = compose.create(model, "lora", options, name="a", seed=5)
    compose.activate(model, "a")
    initial = {key: value.clone() for key, value in adapter.state().items()}
    ours = [record["loss"] for record in fit(model, adapter, data, None, config).history]
    theirs = losses_of_peer(peer(initial, quantize), data, config)
    assert ours[-1] < 0.6 * ours[0]
    assert ours == pytest.approx(theirs, abs=within)


@pytest.mark.parametrize("name", ["rslora", "dora", "ia3", "prefix", "prompt", "krona"])
def test_other_methods_equal_those_of_peft(tiny, name, tmp_path):
    """The peer reads our fresh adapter from disk, and trains on."""
    ids = [[4 + (5 * i + 3 * j) % 49 for j in range(4 + i % 7)] for i in range(80)]
    labels = [[IGNORE, *row[1:]] for row in ids]  # PEFT lets the last virtual token predict the first real one
    data = Dataset({"input_ids": Ragged.of(ids), "labels": Ragged.of(labels)}, "causal_lm", pad_id=1)
    sizes = {"prefix": {"hidden": 0, "num_virtual_tokens": 4}, "prompt": {"num_virtual_tokens": 4}, "ia3": {}}
    options = sizes.get(name, {"r": 4})
    config = TrainConfig(
        method=name, options=options, duration=STEPS, batch_size=ROWS, lr=1e-2, schedule="constant", warmup=0.0
    )
    method, config = make_method(config)
    model = tiny.model("llama")
    learner = method.build(model, seed=5)
    compose.save(learner, tmp_path, model=model, task="causal_lm")
    initial = {key: value.clone() for key, value in learner.state().items()}
    learns_inputs = name in ("prefix", "prompt")  # which PEFT refuses to load as trainable
    other = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path, is_trainable=not learns_inputs)
    if learns_inputs:
        other.peft_config["default"].inference_mode = False
        other.prompt_encoder.requires_grad_(True)
    theirs = losses_of_peer(other, data, config)
    ours = [record["loss"] for record in fit(model, learner, data, None, config, method=method).history]
    assert ours == pytest.approx(theirs, abs=1e-4)
    moved = [(value - initial[key]).abs().max() for key, value in learner.state().items()]
    assert min(moved) > 1e-2  # else equal losses would say little
