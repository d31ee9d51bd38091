"""A DoRA behind block functions: its norm is that of the weight below, which no function is part of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import compose

SITES = {"llama": "model.layers.0.mlp.down_proj", "gpt2": "transformer.h.0.mlp.c_proj"}
FUNCTIONS = {
    "parallel": ("bottleneck", {"style": "parallel"}),
    "pfeiffer": ("bottleneck", {}),
    "krona_b": ("krona_b", {}),
    "krona_b residual": ("krona_b", {"residual": True}),
}


@pytest.fixture(params=sorted(SITES))
def at_site(request: Any, tiny: Any) -> Any:
    """A model with DoRAs d and e, and the output of one site for what is active there."""
    model = tiny.model(request.param)
    for name in "de":
        tiny.adapter(model, "dora", name, seed=ord(name), target_modules=("mlp.down",), layers=(0,)).freeze()

    def output(expr: str | None) -> Tensor:
        seen: list[Tensor] = []
        compose.activate(model, expr)
        hook = model.get_submodule(SITES[request.param]).register_forward_hook(lambda *call: seen.append(call[2]))
        with torch.no_grad():
            model(torch.arange(5, 16)[None])
        hook.remove()
        return seen[0]

    output.model = model  # type: ignore[attr-defined]
    return output


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_below_a_dora_is_added_to_what_the_dora_makes(at_site: Any, tiny: Any, name: str) -> None:
    kind, options = FUNCTIONS[name]
    tiny.adapter(at_site.model, kind, "f", layers=(0,), **options).freeze()
    base = at_site(None)
    function = at_site("f") - base
    assert function.norm() > 0.01 * base.norm()
    # y = g (W + s B A) x + c + F: a gain of DoRA leaves alone what is not W x
    torch.testing.assert_close(at_site("f >> d"), at_site("d") + function)
    torch.testing.assert_close(at_site("0.5 * f >> d"), at_site("d") + 0.5 * function)
    torch.testing.assert_close(at_site("f >> d >> e"), at_site("d >> e") + function)
    torch.testing.assert_close(
        at_site("(0.5 * (d >> f)) >> e"), at_site("(0.5 * d) >> e") + at_site("d >> f") * 0.5 - at_site("d") * 0.5
    )
    if kind == "krona_b" or options:  # it reads what enters the block, not what is below
        torch.testing.assert_close(at_site("d >> f"), at_site("d") + function)


def test_a_dora_trains_behind_a_parallel_bottleneck(tiny: Any) -> None:
    model = tiny.model("llama")
    tiny.adapter(model, "bottleneck", "f", style="parallel").freeze()
    dora = tiny.adapter(model, "dora", "d", target_modules=("mlp.down",))
    compose.activate(model, "f >> d")
    ids = torch.arange(5, 16)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in dora.parameters())
