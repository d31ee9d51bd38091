"""A base some of whose layers accelerate keeps outside memory: the same outputs, or a refusal that names the layer."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

import compose
from compose.kind.registry import kinds
from hub.errors import GateError

IDS = torch.arange(5, 21)[None]


def base(*offloaded: int, folder: Any = None) -> Any:
    model = compose.load("builtin:tiny-lm", dtype="fp32")
    for layer in offloaded:
        if folder is None:
            accelerate.cpu_offload(model.model.layers[layer])
        else:
            accelerate.disk_offload(model.model.layers[layer], str(folder / str(layer)))
    return model


def adapted(model: Any, kind: str, **options: Any) -> Any:
    adapter = compose.create(model, kind, options, name="a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        adapter.freeze()
        compose.activate(model, "a")
        return model(IDS).logits


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_kind_works_on_offloaded_layers_or_names_them(kind: str) -> None:
    wanted = adapted(base(), kind)
    model = base(1, 2)
    bare = model(IDS).logits
    try:
        found = adapted(model, kind)
    except GateError as error:
        assert kind in ("dora", "ia3", "bias", "dense", "sparse")  # they read or move the layer's own parameters
        assert "offloaded" in error.message and "device_map" in str(error.hint)
        compose.activate(model, None)
        assert torch.equal(model(IDS).logits, bare)
    else:
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_elsewhere_every_kind_works(kind: str, tmp_path: Any) -> None:
    wanted = adapted(base(), kind, layers=(0, 3))
    torch.testing.assert_close(adapted(base(1, 2, folder=tmp_path), kind, layers=(0, 3)), wanted)


def test_a_base_that_is_offloaded_whole_is_refused() -> None:
    model = compose.load("builtin:tiny-lm")
    compose.eject(model)
    accelerate.cpu_offload(model)
    with pytest.raises(GateError, match="LlamaForCausalLM is offloaded"):
        compose.create(model, "lora", name="a")
