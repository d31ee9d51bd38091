"""Whatever is given as a model or as an adapter works, or is refused by the name of its type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import compose
from compose.base.compatibility import BaseWarning
from compose.base.location import locate
from compose.errors import ExpressionError
from hub.errors import GateError, HubError, UsageError

IDS = torch.arange(5, 21)[None]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def loaded(**options: Any) -> Any:
    directory = locate("builtin:tiny-lm").directory
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def with_peft(*names: str) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


NO_MODELS: dict[str, Callable[[], Any]] = {
    "Linear": lambda: torch.nn.Linear(2, 2),
    "int": lambda: 3,
    "NoneType": lambda: None,
    "PeftModel": lambda: with_peft("default"),
    "LlamaForCausalLM": lambda: with_peft("default").get_base_model(),
}


@pytest.mark.parametrize("name", sorted(NO_MODELS))
def test_what_is_no_model_for_adapters_is_named(name: str) -> None:
    given = NO_MODELS[name]()
    before = None if not isinstance(given, torch.nn.Module) else [n for n, _ in given.named_modules()]
    acts: list[Callable[[], Any]] = [
        lambda: compose.load(given),
        lambda: compose.activate(given, None),
        lambda: compose.create(given, "lora", name="a"),
        lambda: compose.attach(given, "a", "ns/a"),
        lambda: compose.identity(given),
        lambda: compose.eject(given),
    ]
    for act in acts:
        with pytest.raises(HubError, match=rf"this (is a )?{name}") as refused:
            act()
        assert refused.value.hint
    assert before is None or [n for n, _ in given.named_modules()] == before


def test_a_peft_model_in_memory_is_an_adapter() -> None:
    for names in (("default",), ("first", "second")):
        theirs = with_peft(*names)
        theirs.set_adapter(names[-1])
        with torch.no_grad():
            wanted = theirs(IDS).logits
        model = compose.load("builtin:tiny-lm", "x", adapters={"x": theirs}, dtype="fp32")
        bare = loaded()(IDS).logits
        assert (model(IDS).logits - wanted).norm() < 1e-5 * (wanted - bare).norm()
        compose.attach(model, "y", theirs)
        compose.activate(model, "y")
        assert (model(IDS).logits - wanted).norm() < 1e-5 * (wanted - bare).norm()


@pytest.mark.parametrize("given", [None, 3, torch.nn.Linear(2, 2)], ids=lambda given: type(given).__name__)
def test_what_is_no_adapter_is_named(given: Any) -> None:
    model = compose.load("builtin:tiny-lm")
    with pytest.raises(UsageError, match=f"'x' stands for a {type(given).__name__}"):
        compose.attach(model, "x", given)
    with pytest.raises(UsageError, match=f"'x' stands for a {type(given).__name__}"):
        compose.load("builtin:tiny-lm", "x", adapters={"x": given})
    for expr in (3, [3], ["x", 0.5]):
        with pytest.raises((ExpressionError, HubError), match=r"no adapter 'x'|an expression is text"):
            compose.activate(model, expr)  # type: ignore[arg-type]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": lambda model: torch.nn.DataParallel(model) if not torch.cuda.is_available() else model,
}


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_wrapped_model_is_the_model_inside(name: str) -> None:
    model = loaded()
    wrapped = WRAPPERS[name](model)
    assert compose.load(wrapped) is wrapped
    adapter = compose.create(wrapped, "lora", name="a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
        adapter.freeze()
        bare = wrapped(IDS).logits
        compose.activate(wrapped, "a")
        adapted = wrapped(IDS).logits
        assert (adapted - bare).norm() > 0.01 * bare.norm()
        compose.activate(model, None)
        assert torch.equal(wrapped(IDS).logits, bare)
        compose.activate(model, "a")
        assert torch.equal(model(IDS).logits, adapted)
        compose.eject(wrapped)
        assert torch.equal(wrapped(IDS).logits, bare)


def test_a_ref_on_a_quantized_model_in_memory(store: Any, tmp_path: Path) -> None:
    known = loaded(quantization_config=NF4)
    assert compose.load(known, "ns/a") is known  # its unquantized files are here
    assert bool(known(IDS).logits.isfinite().all())

    pre = tmp_path / "pre-bnb-4bit"
    loaded(quantization_config=NF4).save_pretrained(pre)
    assert "quantization_config" in json.loads((pre / "config.json").read_text())
    with pytest.raises(GateError, match="quantized already"):
        compose.load(pre, "ns/a")
    unknown = AutoModelForCausalLM.from_pretrained(pre)
    for act in (lambda: compose.load(unknown, "ns/a"), lambda: compose.attach(unknown, "a", store.get("ns/a"))):
        with pytest.raises(GateError, match="its identity is unknown") as refused:
            act()
        assert "allow_base_drift=True" in str(refused.value.hint)
    with pytest.warns(BaseWarning, match="adapters are not compared with it"):
        compose.load(unknown, "ns/a", allow_base_drift=True)
    torch.testing.assert_close(unknown(IDS).logits, known(IDS).logits)
