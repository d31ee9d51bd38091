from __future__ import annotations

import math
import types

import pytest
import torch
from torch import nn

from train.data.batches import Dataset, Ragged
from train.errors import DataError
from train.steps.evaluate import calibration_error, evaluate, f1_macro, perplexity
from train.steps.objective import loss_sum


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_loss_is_per_token_whatever_the_batches(toy, ragged_lm, batch_size):
    model, _ = toy()
    data = ragged_lm(20, longest=40)
    one_by_one = 0.0
    with torch.no_grad():
        for row in range(len(data)):
            ids = data.tokens.row(row).long()[None]
            one_by_one += float(loss_sum("causal_lm", model(ids).logits, ids))
    measured = evaluate(model, data, batch_size=batch_size)
    assert measured["loss"] == pytest.approx(one_by_one / int(data.items.sum()), rel=1e-5)
    assert measured["tokens"] == int(data.items.sum())
    assert perplexity(model, data, batch_size=batch_size) == pytest.approx(math.exp(measured["loss"]))


class Guess(nn.Module):
    """Logits by the first token: a table of (V, C)."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(logits=self.table[input_ids[:, 0]])


def test_classification_measures_in_row_order_of_any_batching():
    table = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 0.0]])
    ids = Ragged.of([[0, 0, 0], [1], [2, 2], [1, 1], [0]])
    data = Dataset({"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0, 0])}, "classification")
    measured = [evaluate(Guess(table), data, batch_size=size) for size in (1, 2, 5)]
    assert measured[0]["accuracy"] == 3 / 5
    # class 0: TP 2, FP 1, FN 1 -> 2/3; class 1: TP 1, FP 1, FN 1 -> 1/2
    assert measured[0]["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    for other in measured[1:]:
        assert other == pytest.approx(measured[0])


def test_f1_of_perfect_and_of_wrong():
    labels = torch.tensor([0, 1, 2, 2])
    assert f1_macro(labels, labels) == 1.0
    assert f1_macro(torch.tensor([1, 2, 0, 0]), labels) == 0.0


def test_calibration_error_of_known_cases():
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 0])) == 0.0
    assert calibration_error(sure, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)
    # two bins: .9 sure and half right (gap .4), .6 sure and all right (gap .4)
    mixed = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(mixed, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4)


def test_evaluation_leaves_no_trace(toy, ragged_lm):
    model, adapter = toy(dropout=0.5)
    model.train()
    state = torch.get_rng_state()
    first = evaluate(model, ragged_lm())
    assert evaluate(model, ragged_lm()) == first
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in adapter.parameters())


def test_an_empty_split_is_an_error(toy):
    with pytest.raises(DataError, match="no rows"):
        evaluate(toy()[0], Dataset({"input_ids": Ragged.of([])}, "causal_lm"))
