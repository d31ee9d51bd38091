"""``at(a, layers=..., sites=...)``: the adapter where it says, the base elsewhere."""

from typing import Any

import pytest
import torch

import compose
from compose.algebra import normalize, parse
from compose.errors import ExpressionError, KindError, PlanError, SiteError
from compose.runtime.model_runtime import runtime


def home(tiny: Any, family: str, *kinds: str) -> Any:
    model = tiny.model(family)
    for i, kind in enumerate(kinds):
        tiny.adapter(model, kind, "abc"[i], seed=i + 1)
    return model


def acts(model: Any, expr: str | None) -> list[str]:
    """Paths whose slots do something."""
    compose.activate(model, expr)
    return [path for path, slot in runtime(model)._slots.items() if slot.program is not None]


def test_layers_and_sites_are_where_it_acts(tiny):
    model = home(tiny, "llama", "lora")
    assert {p.split(".")[2] for p in acts(model, "at(a, layers=[1])")} == {"1"}
    assert {p.rsplit(".", 1)[-1] for p in acts(model, "at(a, sites=[attn.q])")} == {"q_proj"}
    assert acts(model, 'at(a, layers=[0], sites=["v_proj"])') == ["model.layers.0.self_attn.v_proj"]


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bottleneck", "bias", "prefix"])
def test_the_layers_add_up_to_the_whole(tiny, kind):
    model = home(tiny, "llama", kind)
    batch = tiny.batch("llama", tiny.rows(5, 3))
    compose.activate(model, "a")
    whole = tiny.logits(model, batch)
    compose.activate(model, "at(a, layers=[0, 1])")
    for got, expected in zip(tiny.logits(model, batch), whole, strict=True):
        assert torch.equal(got, expected)
    compose.activate(model, "at(a, layers=[0]) >> at(a, layers=[1])")
    for got, expected in zip(tiny.logits(model, batch), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    compose.activate(model, "at(a, layers=[0])")
    assert not torch.allclose(tiny.logits(model, batch)[0], whole[0], atol=1e-4)


def test_rows_may_be_limited_differently(tiny):
    model = home(tiny, "llama", "lora", "prefix")
    batch = tiny.batch("llama", tiny.rows(5, 5, 5))
    texts = ["at(a, layers=[1])", "at(b, layers=[0]) + at(a, sites=[attn.v])", None]
    compose.activate(model, texts)
    mixed = tiny.logits(model, batch)
    for i, text in enumerate(texts):
        compose.activate(model, text)
        torch.testing.assert_close(mixed[i], tiny.logits(model, batch)[i], rtol=1e-4, atol=1e-5)


def test_it_distributes_and_has_one_form():
    spread = normalize(parse("at(0.5 * a + (b >> c), layers=[2, 0, 2])"))
    assert spread == normalize(parse("0.5 * at(a, layers=[0, 2]) + (at(b, layers=[0, 2]) >> at(c, layers=[0, 2]))"))
    assert normalize(spread) == spread
    assert normalize(parse("at(a)")) == parse("a")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("at(a, layers=[])", ExpressionError, "layers is empty"),
        ("at(a, layers=[-1])", ExpressionError, "no layer -1"),
        ("at(a, layers=[9])", SiteError, "no layer 9"),
        ('at(a, sites=["q_prog"])', SiteError, "did you mean"),
        ("at(b, layers=[0])", KindError, "acts on the text itself"),
        ("average(at(a, layers=[0]), a)", PlanError, "merges the parameters"),
    ],
)
def test_what_cannot_be_limited_is_refused_by_name(tiny, text, error, says):
    model = home(tiny, "llama", "lora", "prompt")
    compose.activate(model, "a")
    with pytest.raises(error, match=says):
        compose.activate(model, text)
    assert str(runtime(model).rows[0]) == "a"
