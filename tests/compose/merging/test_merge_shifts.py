"""Merges of dense, sparse, Kronecker and intrinsic deltas: exact in the deltas, whole where no rank is asked for."""

from __future__ import annotations

import pytest

from compose.errors import KindError
from compose.merging.merge import lower_to_lora, merge
from compose.runtime.model_runtime import activate, runtime


def outputs(tiny, model, expr):
    activate(model, expr)
    return tiny.logits(model, tiny.batch("bert", tiny.rows(5, 3)))


@pytest.mark.parametrize("kinds", [("dense", "dense"), ("sparse", "sparse"), ("dense", "sparse")])
def test_shifts_merge_as_they_are(tiny, close, kinds):
    """Norms and biases too: tau is the delta of every parameter."""
    model = tiny.model("bert")
    for i, (kind, name) in enumerate(zip(kinds, "ab", strict=True)):
        tiny.adapter(model, kind, name, seed=i, noise=0.1).freeze()
    for text, same in (("average(a, b)", "0.5 * a + 0.5 * b"), ("ties(a, density=1)", "a"), ("a + 0.5 * b",) * 2):
        made = merge(model, text, name="m").adapter
        assert made.kind == "dense"

        runtime(model).add("m", made)
        close(outputs(tiny, model, "m"), outputs(tiny, model, same), factor=2)


@pytest.mark.parametrize("other", ["krona", "said", "lora", "dora"])
def test_a_merge_of_full_rank_is_dense_or_of_the_rank_asked_for(tiny, close, other):
    model = tiny.model("bert")
    options = {"target_modules": ["query", "attention.output.dense"]}
    tiny.adapter(model, "krona", "a", **options).freeze()
    tiny.adapter(model, other, "b", seed=2, **options).freeze()
    expected = outputs(tiny, model, "0.5 * a + 0.5 * b")
    made = merge(model, "average(a, b)", name="m")
    assert made.adapter.kind == "dense" and made.certificate.exact

    runtime(model).add("m", made.adapter)
    close(outputs(tiny, model, "m"), expected, factor=2)
    small = merge(model, "svd(a, b, rank=3)", name="s")
    assert small.adapter.kind == "lora" and 0 < small.certificate.share < 1
    whole = lower_to_lora(model, "0.5 * a + 0.5 * b", rank=32, name="l")
    runtime(model).add("l", whole.adapter)
    close(outputs(tiny, model, "l"), expected, factor=5)
    with pytest.raises(KindError, match="full rank"):
        lower_to_lora(model, "a")
