"""LoraHub: the search for weights, and the two ways to sum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compose
from compose.errors import KindError
from compose.merges import lorahub
from compose.merging.merge import merge
from compose.runtime.model_runtime import runtime

WEIGHTS = ("lora", "dora")  # kinds that add a matrix to a weight
VECTORS = ("ia3", "bias")
TENSORS = ("bottleneck", "prefix", "prompt")
Q = "model.layers.0.self_attn.q_proj"


def off(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other).norm() / other.norm())


def test_lorahub_finds_the_weights_that_made_a_target(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    target = home.logits("lorahub(a, b, weights=[1, -0.5])")

    def score(model: Any) -> float:
        return float((torch.cat(home.tiny.logits(model, home.batch)) - target).square().mean())

    home.logits("a")
    active = runtime(home.model).rows
    found = lorahub.search(home.model, ["a", "b"], score, budget=80, penalty=0.001, seed=1)
    assert runtime(home.model).rows == active
    assert set(runtime(home.model).adapters) == {"a", "b", "lorahub(a, b, weights=[1, -0.5])"}  # no candidate stays
    # w and -w are the same composition in the paper's form
    assert min(np.abs(np.array(found.weights) - s * np.array([1, -0.5])).max() for s in (1, -1)) < 0.2
    assert found.score == found.history[-1] < found.history[0] and len(found.history) <= 80
    assert found == lorahub.search(home.model, ["a", "b"], score, budget=80, penalty=0.001, seed=1)
    assert home.apart(found.expr, "lorahub(a, b, weights=[1, -0.5])") < 0.3


def test_lorahub_sums_factors_as_the_paper_or_deltas_exactly(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", target_modules=("attn.q",))
    a, b = (runtime(home.model).adapters[n] for n in "ab")
    scale = a.config.scale
    home.merge("lorahub(a, b, weights=[0.5, -1])")
    wanted = scale * (0.5 * a.at(Q, "B") - b.at(Q, "B")) @ (0.5 * a.at(Q, "A") - b.at(Q, "A"))
    assert off(home.delta("merged"), wanted.detach()) < 1e-5
    home.merge("lorahub(a, b, weights=[0.5, -1], variant=exact)")
    assert off(home.delta("merged"), home.delta("0.5 * a - b")) < 1e-5
    home.merge("lorahub(a, weights=[3])")
    assert off(home.delta("merged"), 9 * home.delta("a")) < 1e-5  # a single module scales as w^2, as the paper's does


def test_lorahub_refuses_what_it_cannot_search(lab: Any) -> None:
    home = lab()
    home.add("lora", "a")
    home.add("lora", "b", size=1)
    with pytest.raises(KindError, match="no weights yet"):
        compose.activate(home.model, "lorahub(a, b)")
    with pytest.raises(KindError, match=r"ranks \[3, 4\]"):
        merge(home.model, "lorahub(a, b, weights=[1, 1])")
    with pytest.raises(KindError, match="is nan"):
        lorahub.search(home.model, ["a"], lambda model: math.nan)
    assert set(runtime(home.model).adapters) == {"a", "b"}
