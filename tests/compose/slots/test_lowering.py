"""``+``, ``*`` and ``>>`` at a linear site, against the formulas written out on dense matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compose.algebra import parse
from compose.base.weights import bias_of, dense_weight
from compose.errors import KindError
from compose.expr.tree import Add, Expr, Ref, Scale, Seq, add, seq
from compose.runtime.model_runtime import activate, runtime

# Two of each: adapters that add, that multiply the output, the input, and that read the weight below them.
RESIDENTS = {
    "lora1": ("lora", {}),
    "lora2": ("lora", {"r": 2, "use_rslora": True}),
    "dora1": ("dora", {}),
    "dora2": ("dora", {"r": 3}),
    "bias1": ("bias", {}),
    "out1": ("ia3", {"feedforward_modules": ()}),
    "out2": ("ia3", {"feedforward_modules": ()}),
    "in1": ("ia3", {}),
    "in2": ("ia3", {}),
}
SITES = {
    "opt": "model.decoder.layers.1.fc2",
    "gpt2": "transformer.h.1.mlp.c_proj",
    "llama": "model.layers.1.mlp.down_proj",
}


class Reference:
    """The site as y = M x + c, and what each expression makes of (M, c). Written from the formulas, in float64."""

    def __init__(self, model, path, weights=None):
        self.adapters, self.path, self.weights = runtime(model).adapters, path, weights or {}
        layer = runtime(model).slot(path).layer
        matrix, bias = dense_weight(layer).double(), bias_of(layer)
        self.base = matrix, torch.zeros(len(matrix)).double() if bias is None else bias.double()

    def __call__(self, text: str):
        return self.apply(parse(text) if isinstance(text, str) else text, self.base)

    def apply(self, expr: Expr, below):
        if isinstance(expr, Seq):
            for stage in expr.stages:
                below = self.apply(stage, below)
            return below
        entries, branches = self.side_by_side(expr, 1.0)
        matrix, bias = self.stage(entries, below)
        for weight, branch in branches:  # the base plus what the branch changes
            changed = self.apply(branch, below)
            matrix, bias = matrix + weight * (changed[0] - below[0]), bias + weight * (changed[1] - below[1])
        return matrix, bias

    def side_by_side(self, expr: Expr, factor: float):
        if isinstance(expr, Ref):
            return [(factor * self.weights.get(expr.text, 1.0), expr.text)], []
        if isinstance(expr, Scale):
            return self.side_by_side(expr.of, factor * expr.factor)
        if isinstance(expr, Add):
            parts = [self.side_by_side(term, factor) for term in expr.terms]
            return [e for entries, _ in parts for e in entries], [b for _, branches in parts for b in branches]
        return [], [(factor, expr)]

    def stage(self, entries, below):
        matrix, bias = below
        rows, columns, bias_gain = torch.ones(len(matrix)), torch.ones(matrix.shape[1]), torch.ones(len(matrix))
        delta, shift = torch.zeros_like(matrix), torch.zeros_like(bias)
        for w, name in entries:
            adapter = self.adapters[name]
            tensors = {
                k: adapter.at(self.path, k).detach().double()
                for k in ("A", "B", "magnitude", "b", "out", "in")
                if adapter.has(self.path, k)
            }
            if "A" in tensors:
                update = adapter.config.scale * tensors["B"] @ tensors["A"]
                if "magnitude" in tensors:
                    gain = tensors["magnitude"] / (matrix + update).norm(dim=1)
                    rows, update = rows + w * (gain - 1), gain[:, None] * update
                delta = delta + w * update
            elif "out" in tensors:
                gain = tensors["out"].flatten()
                rows, bias_gain = rows + w * (gain - 1), bias_gain + w * (gain - 1)
            elif "in" in tensors:
                columns = columns + w * (tensors["in"].flatten() - 1)
            else:
                shift = shift + w * tensors["b"]
        return rows[:, None] * (matrix * columns) + delta, bias * bias_gain + shift


def populate(tiny, family, dtype="fp32"):
    model, path = tiny.model(family, dtype), SITES[family]
    for i, (name, (kind, options)) in enumerate(RESIDENTS.items()):
        options = {**options, "target_modules": (path,)}
        if kind == "ia3" and name.startswith("in"):
            options["feedforward_modules"] = (path,)
        tiny.adapter(model, kind, name, seed=i, **options).freeze()
    return model


@pytest.fixture(scope="module", params=["opt-fp32", "gpt2-fp32", "llama-nf4"])
def populated(tiny, request):
    family, dtype = request.param.split("-")
    return populate(tiny, family, dtype), SITES[family]


def agrees(model, path, reference, x):
    with torch.no_grad():
        ours = model.get_submodule(path)(x).double()
    matrix, bias = reference
    theirs = x.double() @ matrix.T + bias
    assert (ours - theirs).abs().max() <= 3e-5 * max(1.0, theirs.abs().max())


def draw_input(model, path, batch=2, length=3):
    width = dense_weight(runtime(model).slot(path).layer).shape[1]
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(5))


LEAVES = st.sampled_from(sorted(RESIDENTS)).map(Ref)
FACTORS = st.sampled_from([0.5, -1.0, 2.0, 0.3, 0.0])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(Scale, FACTORS, inner),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: add(*parts)),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: seq(*parts)),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(tree=TREES)
def test_random_expressions_follow_the_formulas(populated, tree):
    model, path = populated
    activate(model, tree)
    agrees(model, path, Reference(model, path)(runtime(model).rows[0]), draw_input(model, path))


@pytest.mark.parametrize(
    "text",
    [
        "lora1 >> dora1",  # the norm of W + s B A
        "out1 >> dora1",  # the norm of the scaled rows
        "dora1 >> dora2",
        "in1 >> lora1",
        "lora1 >> in1",  # the input gain reaches the delta below it
        "lora1 >> out1",  # so does the output gain
        "lora1 + out1",  # and here it does not
        "dora1 + dora2",
        "0.5 * (lora1 >> dora1) + bias1",
        "(0.5 * (lora1 >> out1)) >> dora1",
        "dora1 >> (lora1 + dora2) >> out1",
        "lora1 >> lora1",
        "average(lora1, lora2, weights=[0.2, 0.8])",
        "average(out1, out2) >> bias1",
    ],
)
def test_sequences(populated, text):
    model, path = populated
    activate(model, text)
    expr = text
    if "average" in text:
        expr = {
            "average(lora1, lora2, weights=[0.2, 0.8])": "0.2 * lora1 + 0.8 * lora2",
            "average(out1, out2) >> bias1": "(0.5 * out1 + 0.5 * out2) >> bias1",
        }[text]
    agrees(model, path, Reference(model, path)(expr), draw_input(model, path))


@pytest.mark.parametrize(
    "text", ["lora1 + dora1 + out1", "lora1 >> out1 >> in1", "0.5 * (lora1 >> dora2) + in1", "bias1 + in1 + lora2"]
)
@pytest.mark.parametrize("per", ["row", "token"])
def test_weights_by_name_per_row_and_token(populated, text, per):
    model, path = populated
    batch, length = 3, 4
    x = draw_input(model, path, batch, length)
    generator = torch.Generator().manual_seed(3)
    names = parse(text).refs
    weights = {name: torch.rand(batch, length, generator=generator) * 2 - 0.5 for name in names}
    weights[names[0]][1] = 0.0
    if "dora2" in text:  # it takes its norm from the weight below, which must be one for all
        weights.pop("lora1")
    if per == "row":
        weights = {name: w[:, 0].contiguous() for name, w in weights.items()}
    activate(model, text, weights=weights)
    with torch.no_grad():
        ours = model.get_submodule(path)(x).double()
    for i in range(batch):
        for t in range(length):
            here = {name: float(w[i] if w.dim() == 1 else w[i, t]) for name, w in weights.items()}
            matrix, bias = Reference(model, path, here)(text)
            theirs = matrix @ x[i, t].double() + bias
            assert (ours[i, t] - theirs).abs().max() <= 3e-5 * max(1.0, theirs.abs().max()), (i, t)


def test_rows_with_sequences_of_their_own(populated):
    model, path = populated
    texts = ["lora1 >> dora1", None, "lora2 >> dora1", "out1", "lora1 >> dora1", "0.5 * (lora1 >> in1)"]
    activate(model, texts)
    x = draw_input(model, path, 12)
    with torch.no_grad():
        ours = model.get_submodule(path)(x).double()
    for i in range(12):
        matrix, bias = Reference(model, path)(texts[i // 2] or Add(()))
        theirs = x[i].double() @ matrix.T + bias
        assert (ours[i] - theirs).abs().max() <= 3e-5 * max(1.0, theirs.abs().max()), texts[i // 2]


def test_norm_under_row_weights_is_refused(populated):
    model, path = populated
    activate(model, "lora1")
    x = draw_input(model, path)
    before = model.get_submodule(path)(x)
    with pytest.raises(KindError, match=r"dora adapter 'dora1'.*fc2|dora1.*c_proj|dora1.*down_proj"):
        activate(model, "lora1 >> dora1", weights={"lora1": torch.tensor([1.0, 0.0])})
    assert torch.equal(model.get_submodule(path)(x), before)


def test_functions_chain_and_stand_side_by_side(tiny):
    """F_a beside F_b: h + F_a(h) + F_b(h). After it: h' = h + F_a(h), then h' + F_b(h')."""
    model = tiny.model("opt")
    path = SITES["opt"]
    makers = {name: tiny.adapter(model, "bottleneck", name, seed=i).freeze() for i, name in enumerate("ab")}
    scale = tiny.adapter(model, "ia3", "scale", seed=7, target_modules=(path,), feedforward_modules=()).freeze()
    layer = runtime(model).slot(path).layer
    x = torch.randn(2, 3, 48)

    def block(name, h):
        a = makers[name]
        down = torch.relu(h @ a.at(path, "down").T + a.at(path, "down_b"))
        return down @ a.at(path, "up").T + a.at(path, "up_b")

    with torch.no_grad():
        h = layer(x)
        one = h + block("a", h)
        gain = scale.at(path, "out").flatten()
        expected = {
            "a": one,
            "a + b": one + block("b", h),
            "a >> b": one + block("b", one),
            "b >> a": h + block("b", h) + block("a", h + block("b", h)),
            "0.5 * a - 2 * b": h + 0.5 * block("a", h) - 2 * block("b", h),
            "0.5 * (a >> b)": h + 0.5 * (one + block("b", one) - h),
            "scale >> a": h * gain + block("a", h * gain),
            "a >> scale": one * gain,
        }
        for text, wanted in expected.items():
            activate(model, text)
            assert torch.allclose(model.get_submodule(path)(x), wanted, atol=1e-5), text


@pytest.mark.parametrize("per", ["row", "token"])
def test_rows_of_their_own_with_weights_by_name(populated, per):
    model, path = populated
    texts = ["lora1 + out1", "lora1 >> out1", None, "0.5 * lora1 + bias1"]
    x = draw_input(model, path, 4, 3)
    generator = torch.Generator().manual_seed(11)
    shape = (4,) if per == "row" else (4, 3)
    weights = {name: torch.rand(shape, generator=generator) for name in ("lora1", "out1")}
    activate(model, texts, weights=weights)
    with torch.no_grad():
        ours = model.get_submodule(path)(x).double()
    for i, t in itertools.product(range(4), range(3)):
        here = {name: float(w[i] if per == "row" else w[i, t]) for name, w in weights.items()}
        matrix, bias = Reference(model, path, here)(texts[i] or Add(()))
        theirs = matrix @ x[i, t].double() + bias
        assert (ours[i, t] - theirs).abs().max() <= 3e-5 * max(1.0, theirs.abs().max()), (i, t)
