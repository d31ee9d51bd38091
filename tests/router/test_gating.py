"""Scores to weights to rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.algebra import parse
from hub.errors import NotFound, UsageError
from router.dispatch import row_expressions
from router.gating import gate
from router.scorers.task import TaskScorer


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.9), st.floats(0.05, 10))
def test_rows_are_distributions_with_at_most_k_experts(seed, experts, k, threshold, temperature):
    scores = torch.randn(5, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = min(k, experts)
    weights = gate(scores, top_k=k, threshold=threshold, temperature=temperature)
    assert torch.allclose(weights.sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-12)
    assert int((weights > 0).sum(-1).max()) <= k
    assert torch.equal(weights.argmax(-1), scores.argmax(-1))


def test_without_limits_it_is_a_softmax():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(gate(scores, temperature=2.0), (scores / 2).softmax(-1), atol=1e-12)


def test_threshold_drops_and_shares():
    scores = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    assert gate(scores, threshold=0.15).tolist()[0] == pytest.approx([7 / 9, 2 / 9, 0.0])
    assert gate(scores, threshold=0.8).tolist()[0] == [1.0, 0.0, 0.0]


def test_equal_scores_keep_the_earlier_expert():
    assert gate(torch.zeros(1, 3), top_k=1).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "bad",
    [
        {"scores": torch.tensor([[float("nan"), 0.0]])},
        {"scores": torch.full((1, 2), float("-inf"))},
        {"top_k": 0},
        {"top_k": 3},
        {"threshold": 1.0},
        {"temperature": 0.0},
    ],
)
def test_bad_input(bad):
    options = {"scores": torch.zeros(1, 2), **bad}
    with pytest.raises(UsageError):
        gate(options.pop("scores"), **options)


def test_given_task_is_one_hot_and_dispatches_to_the_names():
    experts = ["mail", "ns/code@1.0", "law"]
    weights = gate(TaskScorer(experts)(["law", "mail", "law"]))
    assert weights.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert row_expressions(experts, weights) == [parse("law"), parse("mail"), parse("law")]


def test_soft_weights_and_zero_weights():
    rows = row_expressions(["a", "b"], torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.5, 0.0]]))
    assert rows == [parse("0.25 * a + 0.75 * b"), None, parse("0.5 * a")]


def test_unknown_task_names_row_and_neighbour():
    with pytest.raises(NotFound, match="row 1 asks for 'mial'") as caught:
        TaskScorer(["mail", "code"])(["code", "mial"])
    assert caught.value.hint == "did you mean mail?"
