"""torch.compile of a composed model: the same outputs, and no new compilation for other weights or another adapter."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from compose.runtime.model_runtime import activate


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("lora", False),
        pytest.param("lora", True, marks=pytest.mark.slow),
        pytest.param("dora", False, marks=pytest.mark.slow),
        pytest.param("ia3", False, marks=pytest.mark.slow),
        pytest.param("dense", False, marks=pytest.mark.slow),
        pytest.param("bottleneck", False, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_other_weights_and_adapters_are_not_compiled_again(tiny, kind, rows):
    torch._dynamo.reset()
    model = tiny.model("llama", num_hidden_layers=1)
    a, _ = (tiny.adapter(model, kind, name, seed=i).freeze() for i, name in enumerate("ab"))
    batch = tiny.batch("llama", tiny.rows(5, 5))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    activate(model, ["a", "b"] if rows else "a")
    outputs = []
    for _ in range(2):  # the second call finds the factors laid out
        outputs.append(compiled(**batch).logits)
    frames = counter.frame_count
    assert frames > 0
    a.load_state({key: 1.5 * value for key, value in a.state().items()})
    outputs.append(compiled(**batch).logits)
    torch.testing.assert_close(outputs[-1], model(**batch).logits)
    activate(model, ["b", "a"] if rows else "b")
    outputs.append(compiled(**batch).logits)
    torch.testing.assert_close(outputs[-1], model(**batch).logits)
    assert counter.frame_count == frames, "a hot swap was compiled again"
    assert not torch.equal(outputs[1], outputs[2]) and not torch.equal(outputs[2], outputs[3])
    torch._dynamo.reset()
