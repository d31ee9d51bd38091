"""QLoRA: training a LoRA on an nf4 base loses what peft + bitsandbytes lose, step by step."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import compose
from compose.base.location import locate
from compose.base.model import load_base

STEPS, RATE = 20, 5e-3
LORA = {"r": 8, "lora_alpha": 16}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 4000, (4, 24), generator=generator) for _ in range(4)]


def train(model: Any, parameters: list[Tensor]) -> list[float]:
    """Losses of AdamW over the same batches again and again."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    losses = []
    for step in range(STEPS):
        ids = batches()[step % 4]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def quantized_by_transformers() -> Any:
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    directory = locate("builtin:tiny-lm").directory
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=options)
    return model.train()  # in eval mode bitsandbytes may repack the weights for a kernel that has no backward pass


def same_start(theirs: Any, adapter: Any) -> None:
    """Give PEFT's factors our initial values."""
    with torch.no_grad():
        for key, value in adapter.state().items():
            path, factor = key.removesuffix(".weight").rsplit(".", 1)
            holder = theirs.get_submodule(path)
            if factor == "lora_magnitude_vector":
                holder.lora_magnitude_vector["default"].weight.copy_(value)
            else:
                getattr(holder, factor)["default"].weight.copy_(value)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_losses_equal_peft_s(kind):
    extra = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(kind, {})
    ours = load_base("builtin:tiny-lm", quantize="nf4", dtype="fp32")
    options = {**LORA, "target_modules": "all-linear", "use_rslora": kind == "rslora"}
    adapter = compose.create(ours, "dora" if kind == "dora" else "lora", options, name="a", seed=3)
    compose.activate(ours, "a")
    theirs = peft.get_peft_model(
        quantized_by_transformers(),
        peft.LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM", **extra),
    )
    same_start(theirs, adapter)
    got = train(ours, list(adapter.parameters()))
    expected = train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    worst = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    assert worst <= 1e-3, f"losses differ by {worst:g}: {got} and {expected}"
    assert got[-1] < got[0] - 1, "nothing was learned, so nothing was compared"


def test_the_base_stays_as_it_was():
    model = load_base("builtin:tiny-lm", quantize="nf4", dtype="fp32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = compose.create(model, "lora", LORA, name="a")
    compose.activate(model, "a")
    train(model, list(adapter.parameters()))
    compose.eject(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
