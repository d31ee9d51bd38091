"""A stage laid out for its calls computes what the stage does, and what is remembered of a composition is not stale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compose.atoms import Atoms, Block, Function
from compose.kernels.maps import Kronecker
from compose.runtime.model_runtime import activate, runtime
from compose.slots.block_functions import Blocks
from compose.slots.frozen_stage import frozen_stage
from compose.slots.stage import Entry, Stage, State

D_IN, D_OUT, R = 6, 5, 4
generator = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=generator)


def block(width, activation="relu"):
    act = {"relu": torch.relu, "sigmoid": torch.sigmoid}[activation]
    return Block(rand(width, D_OUT), rand(width), rand(D_OUT, width), rand(D_OUT), activation, act, 1.5)


ATOMS = {
    "pair": lambda: Atoms(A=rand(2, D_IN), B=rand(D_OUT, 2), scale=0.5),
    "dora": lambda: Atoms(A=rand(3, D_IN), B=rand(D_OUT, 3), gain=rand(D_OUT)),
    "gain": lambda: Atoms(gain=rand(D_OUT), gain_scales_bias=True),
    "input": lambda: Atoms(input_gain=rand(D_IN)),
    "bias": lambda: Atoms(bias=rand(D_OUT)),
    "delta": lambda: Atoms(delta=Kronecker(rand(1, 2), rand(D_OUT, 3), 2.0)),
    "block": lambda: Atoms(function=Function(block(3))),
    "wider": lambda: Atoms(function=Function(block(4))),
    "other": lambda: Atoms(function=Function(block(2, "sigmoid"))),
}
ROWS = {
    "one for all": lambda names: dict.fromkeys(names, 0.7),
    "in turn": lambda names: {n: torch.tensor([float(i % R == r) for r in range(R)]) for i, n in enumerate(names)},
    "together": lambda names: {n: rand(R) for n in names},
    "few": lambda names: {n: torch.tensor([0.0, 0.5 + i, 0.0, 0.0]) for i, n in enumerate(names)},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", [[n] for n in ATOMS] + [list(ATOMS), list(ATOMS)[::-1], ["block", "wider"]])
def test_laid_out_it_computes_the_same(names, rows, times, bias):
    layer = nn.Linear(D_IN, D_OUT, bias=bias).requires_grad_(False)
    weights = ROWS[rows](names)
    stage = Stage([Entry(n, n, ATOMS[n](), weights[n], live=False) for n in names])
    laid_out = frozen_stage(stage)
    assert laid_out is not None
    x = rand(R * times, 3, D_IN)
    kept = x.clone()
    expected = stage.run(lambda z: State(layer(z), layer.bias), x).y
    torch.testing.assert_close(laid_out.on(layer, x)(layer, x), expected, atol=5e-5, rtol=5e-5)
    assert torch.equal(x, kept), "the input belongs to the model"
    reads = x.clone().requires_grad_()
    torch.testing.assert_close(laid_out.on(layer, reads)(layer, reads), expected, atol=5e-5, rtol=5e-5)


def test_gradients_pass_through():
    layer = nn.Linear(D_IN, D_OUT).double().requires_grad_(False)
    weights = ROWS["in turn"](list(ATOMS))
    stage = Stage([Entry(n, n, _double(make()), weights[n], live=False) for n, make in ATOMS.items()])
    x = rand(R, 2, D_IN).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: frozen_stage(stage).on(layer, z)(layer, z), [x])


def _double(atoms):
    values = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(atoms).items()}
    if isinstance(atoms.function, Function):
        fn = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(atoms.function.fn).items()}
        values["function"] = Function(Block(**fn))
    return Atoms(**values)


@pytest.mark.parametrize(
    "weights", [torch.ones(R), torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None].expand(R, 2), rand(R, 2).requires_grad_()]
)
def test_what_cannot_be_laid_out(weights):
    stage = Stage([Entry("a", "a", ATOMS["pair"](), weights, live=weights.dim() == 1)])
    assert frozen_stage(stage) is None, "it trains, or its weights differ from token to token"


def test_blocks_side_by_side_are_the_sum_of_each():
    blocks = [block(3), block(4), block(2)]
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    z = rand(R, 2, D_OUT)
    together = Blocks(blocks, weights)
    assert together.used.tolist() == [1, 1, 0, 1]
    expected = torch.stack(
        [sum(w * b(row) for w, b in zip(ws, blocks, strict=True)) for ws, row in zip(weights, z, strict=True)]
    )
    torch.testing.assert_close(together(z[[0, 1, 3]]), expected[[0, 1, 3]])


@pytest.mark.parametrize("name", ATOMS)
def test_a_row_beside_an_adapter_that_diverged(name):
    """Every tensor of row 1's adapter is NaN; the other rows are what they are beside a sound one."""
    layer = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    x, other = rand(R, 2, D_IN), torch.tensor([0.0, 1.0, 0.0, 0.0])
    good, outputs = ATOMS[name](), []
    for partner in (ATOMS[name](), _diverged(ATOMS[name]())):
        stage = Stage([Entry("g", "g", good, 1 - other, live=False), Entry("b", "b", partner, other, live=False)])
        outputs.append(frozen_stage(stage).on(layer, x)(layer, x))
    assert outputs[1][1].isnan().all()
    torch.testing.assert_close(outputs[1][[0, 2, 3]], outputs[0][[0, 2, 3]])


def _diverged(atoms):
    if isinstance(atoms.function, Function):
        return Atoms(function=Function(_with(atoms.function.fn, torch.nan)))
    if atoms.delta is not None:
        return Atoms(delta=Kronecker(atoms.delta.left * torch.nan, atoms.delta.right, 1.0))
    return _with(atoms, torch.nan)


def _with(made_of, factor):
    tensors = {k: v * factor for k, v in vars(made_of).items() if isinstance(v, torch.Tensor)}
    return type(made_of)(**{**vars(made_of), **tensors})


def test_going_back_to_a_composition_lowers_nothing_and_sees_what_has_changed(tiny):
    model = tiny.model("llama")
    for name in "ab":
        tiny.adapter(model, "lora", name, seed=ord(name)).freeze()
    home, batch = runtime(model), tiny.batch("llama", tiny.rows(5, 4))

    def logits(expr):
        activate(model, expr)
        with torch.no_grad():
            return model(**batch).logits

    first, other = logits("a"), logits("b")
    programs = [slot.program for slot in home._slots.values()]
    assert torch.equal(logits("a"), first) and torch.equal(logits("b"), other)
    assert all(s.program is p for s, p in zip(home._slots.values(), programs, strict=True)), "nothing is lowered anew"
    a = home.adapters["a"]
    a.load_state({key: 2 * value for key, value in a.state().items()})
    loaded = logits("a")
    assert not torch.equal(loaded, first), "other weights were loaded"
    with torch.no_grad():
        next(p for n, p in a.named_parameters() if n.endswith("B")).add_(1.0)
    assert not torch.equal(logits("a"), loaded), "a parameter was written to"
    logits("b")
    runtime(model).remove("a")
    tiny.adapter(model, "lora", "a", seed=7).freeze()
    fresh = logits("a")
    assert not torch.equal(fresh, first), "another adapter has the name now"
    home.adapters["a"].unfreeze()
    logits("a")
    before = home.composition
    logits("a")
    assert home.composition is not before, "what trains is lowered in each call"


def test_what_was_made_in_inference_mode_is_activated_and_merged_anew(tiny):
    """Tensors made there count no changes: nothing is remembered of them."""
    model = tiny.model("llama")
    batch = tiny.batch("llama", tiny.rows(5))
    first, _ = tiny.adapter(model, "lora", "a").freeze(), tiny.adapter(model, "lora", "b", seed=2).freeze()
    with torch.inference_mode():
        activate(model, "ties(a, b)")
        inside = model(**batch).logits.clone()
        activate(model, "a")
        activate(model, "ties(a, b)")
        assert torch.equal(model(**batch).logits, inside)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter *= -3
        activate(model, "ties(a, b)")
        assert not torch.allclose(model(**batch).logits, inside, atol=1e-2)


def test_another_kind_of_attention_is_served_the_prefix_too(tiny):
    model, batch = tiny.model("llama"), tiny.batch("llama", tiny.rows(5))
    tiny.adapter(model, "prefix", "a").freeze()
    bare = tiny.logits(model, batch)
    activate(model, "a")
    before = tiny.logits(model, batch)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(tiny.logits(model, batch), before, atol=1e-5, rtol=1e-4)
        activate(model, None)
        torch.testing.assert_close(tiny.logits(model, batch), bare, atol=1e-5, rtol=1e-4)
        activate(model, "a")
