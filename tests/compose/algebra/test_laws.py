"""The laws of the algebra over random expressions (depth up to 4), random kinds and sizes, families, fp32 and nf4.

A few dozen cases by default, thousands with ``-m slow``. Every case is counted, so that none is left out silently.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compose.errors import KindError
from compose.expr.tree import Expr, Ref, Scale, Seq, add, seq
from compose.kind.registry import get_kind, kinds
from compose.runtime.model_runtime import activate, runtime

QUICK = (("gpt2", "fp32"), ("bert", "nf4"))
PARTS = {
    "q_and_v": ("lora", ("attn.q", "attn.v")),
    "k": ("dora", ("attn.k",)),
}  # rows of a fused layer where it has one
WEIGHED = tuple(kind for kind in kinds() if kind != "prompt")  # a prompt is there or not
COMMON: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
SEEN: Counter[str] = Counter()


class World:
    """One model with two adapters of every kind, of different sizes, and some on q, k, v alone, all of them frozen."""

    def __init__(self, tiny: Any, family: str, dtype: str) -> None:
        self.tiny, self.family, self.dtype = tiny, family, dtype
        self.model = tiny.model(family, dtype)
        for i, kind in enumerate(kinds()):
            for j in range(2):
                tiny.adapter(self.model, kind, f"{kind}{j}", seed=2 * i + j, size=j, noise=0.1).freeze()
        for name, (kind, targets) in PARTS.items():
            tiny.adapter(self.model, kind, name, noise=0.1, target_modules=targets).freeze()
        self.batch = tiny.batch(family, tiny.rows(4, 3, seed=7))

    def run(self, expr: Any, **weights: Any) -> Any:
        activate(self.model, expr, **weights)
        return self.tiny.logits(self.model, self.batch)


@pytest.fixture(scope="module")
def world(tiny):
    made: dict[tuple[str, str], World] = {}

    def get(family: str, dtype: str) -> World:
        if (family, dtype) not in made:
            made[family, dtype] = World(tiny, family, dtype)
        return made[family, dtype]

    return get


LEAVES = st.sampled_from([f"{kind}{j}" for kind in WEIGHED for j in range(2)] + list(PARTS)).map(Ref)
PROMPTS = st.sampled_from(["prompt0", "prompt1"]).map(Ref)
NUMBERS = st.sampled_from([0.25, 0.5, 1.0, 2.0])  # a prefix has no negative weight


def trees(depth: int) -> st.SearchStrategy[Expr]:
    """Sums, sequences and multiples, ``depth`` deep."""
    if depth == 1:
        return LEAVES
    below = trees(depth - 1)
    several = st.lists(below, min_size=2, max_size=3)
    return st.one_of(
        below,
        st.builds(Scale, NUMBERS, below),
        several.map(lambda parts: add(*parts)),
        several.map(lambda parts: seq(*parts)),
        st.tuples(PROMPTS, below).map(lambda parts: seq(*parts)),
    )


def possible(world: World, expr: Any) -> bool:
    """Whether the algebra has it: what it has not is refused by name, and leaves the model as it was."""
    before = runtime(world.model).rows
    try:
        activate(world.model, expr)
    except KindError as error:
        assert any(kind in str(error) for kind in kinds()), error
        assert runtime(world.model).rows == before
        SEEN["refused"] += 1
        return False
    SEEN["held"] += 1
    return True


def laws(world: World, close: Any, expr: Expr, other: Expr, c: float) -> None:
    """What holds of any expression and another one."""
    if not possible(world, expr):
        return
    factor = 10 if world.dtype == "fp32" else 20
    ours = world.run(expr)
    bare = world.run(None)
    assert all(torch.equal(a, b) for a, b in zip(world.run(Scale(0.0, expr)), bare, strict=True))
    close(world.run(seq(expr)), ours, factor=factor)
    close(world.run(f"average({expr.refs[0]})"), world.run(Ref(expr.refs[0])), factor=factor)
    if "prompt" not in str(expr):
        close(world.run(Scale(c, Scale(1 / c, expr))), ours, factor=factor)
        if not any(isinstance(node, Seq) for node in expr.walk()):
            close(world.run(add(Scale(0.5, expr), Scale(0.5, expr))), ours, factor=factor)
        if possible(world, add(expr, other)):
            close(world.run(add(expr, other)), world.run(add(other, expr)), factor=factor)
    # One expression a row: each row is what it is alone.
    theirs = world.run(other) if possible(world, other) else bare
    rows = [expr, other if possible(world, other) else None]
    if possible(world, rows):
        close(world.run(rows), [ours[0], theirs[1]], factor=factor)


@pytest.mark.parametrize(("family", "dtype"), QUICK)
@settings(max_examples=8, **COMMON)
@given(expr=trees(4), other=trees(2), c=NUMBERS)
def test_laws(world, close, family, dtype, expr, other, c):
    laws(world(family, dtype), close, expr, other, c)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "roberta", "t5", "opt", "gpt_neox"])
@settings(max_examples=200, **COMMON)
@given(expr=trees(4), other=trees(3), c=NUMBERS)
def test_laws_at_length(world, close, family, dtype, expr, other, c):
    laws(world(family, dtype), close, expr, other, c)


def test_most_random_expressions_are_possible():
    """Runs after the laws of this process: they must not have held for want of cases."""
    if not SEEN:
        pytest.skip("the laws did not run in this process")
    assert SEEN["held"] > 2 * SEEN["refused"], SEEN


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_kind_takes_part(world, close, kind):
    """route(one-hot on a) = a, route(a, a) = a, an average of one: for each kind by itself."""
    where = world("llama", "fp32")
    a, b = f"{kind}0", f"{kind}1"
    alone = where.run(a)
    if kind != "prompt":
        one_hot = {"weights": {a: torch.tensor([1.0, 1.0]), b: torch.tensor([0.0, 0.0])}}
        close(where.run(add(Ref(a), Ref(b)), **one_hot), alone, factor=2)
        close(where.run(add(Scale(0.25, Ref(a)), Scale(0.75, Ref(a)))), alone, factor=5)
    close(where.run([a, a]), alone, factor=2)
    assert get_kind(kind).kind == kind
