"""Laws of the algebra on whole models, over kinds and over small random expressions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compose.base.weights import bias_of
from compose.expr.tree import Ref, Scale, add, seq
from compose.kind.registry import get_kind, kinds
from compose.runtime.model_runtime import activate, eject, runtime

WEIGHTS = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0])


def test_average_of_one_is_that_one(tiny, close, kind):
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    tiny.adapter(model, kind, "a").freeze()
    activate(model, "a")
    alone = tiny.logits(model, batch)
    for text in ("average(a)", "average(a, a)", "average(a, a, weights=[0.2, 0.8])", "average(average(a), a)"):
        activate(model, text)
        assert all(torch.equal(x, y) for x, y in zip(tiny.logits(model, batch), alone, strict=True)), text


def test_average_is_the_mean_of_the_parameters(tiny, close, kind):
    """In effect for kinds that are linear in their weight, in the tensors themselves for the others."""
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5, 3))
    a = tiny.adapter(model, kind, "a").freeze()
    b = tiny.adapter(model, kind, "b", seed=2).freeze()
    activate(model, "average(a, b, weights=[1, 3])")
    ours = tiny.logits(model, batch)
    if get_kind(kind).averages_in_weight:
        activate(model, "0.25 * a + 0.75 * b")
    else:
        mean = tiny.adapter(model, kind, "mean").freeze()
        mean.load_state({key: 0.25 * value + 0.75 * b.state()[key] for key, value in a.state().items()})
        activate(model, "mean")
    close(ours, tiny.logits(model, batch))


LINEAR = ("lora", "dora", "ia3", "bias")  # kinds whose effect on a frozen linear layer is another linear layer


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def linear(tiny, request):
    """A model with two adapters of each linear kind, and one more resident under a name that sorts last."""
    model = tiny.model(request.param)
    for i, kind in enumerate(LINEAR):
        for j in range(2):
            options = {"target_modules": "all-linear"} if kind in ("lora", "dora") else {}
            tiny.adapter(model, kind, f"{kind}{j}", seed=2 * i + j, size=j, noise=0.15, **options).freeze()
    for i, name in enumerate(sorted(runtime(model).adapters)):  # the same under names in another order
        runtime(model).add(f"{9 - i}-{name}", runtime(model).adapters[name])
    return request.param, model


LEAVES = st.sampled_from([f"{kind}{j}" for kind in LINEAR for j in range(2)]).map(Ref)
TERMS = st.lists(st.tuples(WEIGHTS, LEAVES), min_size=1, max_size=4, unique_by=lambda t: t[1])
LAWS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=8, **LAWS)
@given(terms=TERMS, order=st.randoms(use_true_random=False))
def test_sums_commute_associate_and_scale(linear, tiny, close, terms, order):
    family, model = linear
    batch = tiny.batch(family, tiny.rows(5, 3))
    scaled = [Scale(w, leaf) for w, leaf in terms]
    activate(model, add(*scaled))
    expected = tiny.logits(model, batch)

    shuffled = list(scaled)
    order.shuffle(shuffled)
    left = shuffled[0]
    for term in shuffled[1:]:
        left = left + term
    renamed = {name.split("-", 1)[1]: name for name in runtime(model).adapters if "-" in name}
    others = [Scale(w, Ref(renamed[leaf.text])) for w, leaf in terms]
    for same in (left, 0.5 * (2 * left), 0.5 * left + 0.5 * left, add(*others), 2 * add(*(0.5 * t for t in others))):
        activate(model, same)
        close(tiny.logits(model, batch), expected)

    names = {leaf.text for _, leaf in terms}
    activate(model, add(*(Ref(n) for n in names)), weights={leaf.text: w for w, leaf in terms})
    close(tiny.logits(model, batch), expected)
    activate(model, add(*scaled, *(-1 * t for t in scaled)))
    bare = tiny.logits(model, batch)
    activate(model, None)
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), bare, strict=True))


@settings(max_examples=6, **LAWS)
@given(first=TERMS, then=TERMS)
def test_what_is_active_is_a_change_of_weights(linear, tiny, close, first, then):
    """Write what each site computes into a bare model of dense weights: the outputs agree."""
    family, model = linear
    batch = tiny.batch(family, tiny.rows(5, 3))
    activate(model, seq(add(*(Scale(w, leaf) for w, leaf in first)), add(*(Scale(w, leaf) for w, leaf in then))))
    merged = tiny.model(family)
    for path, slot in runtime(model)._slots.items():
        if slot.program is None:
            continue
        layer = merged.get_submodule(path)
        with torch.no_grad():
            if path not in runtime(model).sites.sites:  # a norm: only its bias moves
                zero = torch.zeros(1, 1, layer.bias.shape[0])
                layer.bias.copy_(slot(zero)[0, 0])
                continue
            width = runtime(model).sites[path].in_features
            shift = slot(torch.zeros(1, 1, width))[0, 0]
            matrix = (slot(torch.eye(width)[None])[0] - shift).T  # (d_out, d_in)
            layer.weight.copy_(matrix.T if type(layer).__name__ == "Conv1D" else matrix)
            if bias_of(layer) is None:
                layer.bias = torch.nn.Parameter(shift)
            else:
                layer.bias.copy_(shift)
    close(tiny.logits(model, batch), tiny.logits(merged, batch), factor=10)


ANY = [kind for kind in kinds() if kind != "prompt"]  # a prompt has no weight but zero and one


@settings(max_examples=12, **LAWS)
@given(data=st.data())
def test_rows_of_random_expressions_are_independent(tiny, close, everything, data):
    """Mixed batches over all kinds at once: sums, sequences and weights differ from row to row."""
    model = everything
    leaf = st.sampled_from([f"{kind}{j}" for kind in ANY for j in range(2)]).map(Ref)
    scaled = st.builds(Scale, st.sampled_from([0.25, 1.0, 2.0]), leaf)
    prompt = st.sampled_from(["prompt0", "prompt1"]).map(Ref)
    tree = st.one_of(
        st.none(),
        leaf,
        prompt,
        st.lists(scaled, min_size=2, max_size=3).map(lambda t: add(*t)),
        st.tuples(scaled, leaf).map(lambda t: seq(*t)),
        st.tuples(prompt, leaf, scaled).map(lambda t: seq(t[0], add(t[1], t[2]))),
    )
    exprs = data.draw(st.lists(tree, min_size=3, max_size=3))
    rows = tiny.rows(*data.draw(st.lists(st.integers(1, 6), min_size=3, max_size=3)))
    alone = []
    for row, expr in zip(rows, exprs, strict=True):
        activate(model, expr)
        alone += tiny.logits(model, tiny.batch("llama", [row]))
    activate(model, exprs)
    close(tiny.logits(model, tiny.batch("llama", rows, data.draw(st.sampled_from(["left", "right"])))), alone, factor=2)


@pytest.fixture(scope="module")
def everything(tiny):
    model = tiny.model("llama")
    for i, kind in enumerate(kinds()):
        for j in range(2):
            tiny.adapter(model, kind, f"{kind}{j}", seed=2 * i + j, size=j, noise=0.15).freeze()
    yield model
    eject(model)
