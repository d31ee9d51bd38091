"""Given-task routing of a mixed batch: one forward pass, each row what its adapter alone computes."""

from __future__ import annotations

import torch

import compose
from router import gate, row_expressions
from router.scorers.task import TaskScorer

EXPERTS = ["a", "b", "c"]


def test_each_row_is_its_adapter_alone(model, texts):
    tasks = ["c", "a", "b"]
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    compose.activate(model, row_expressions(EXPERTS, gate(TaskScorer(EXPERTS)(tasks))))
    with torch.no_grad():
        mixed = model(input_ids=texts).logits
        assert len(calls) == 1
        handle.remove()
        for row, task in enumerate(tasks):
            compose.activate(model, task)
            assert torch.allclose(mixed[row], model(input_ids=texts[row : row + 1]).logits[0], atol=2e-5)


def test_a_mixed_batch_generates_what_each_row_does_alone(model, texts):
    tasks = ["b", "b", "a"]
    compose.activate(model, row_expressions(EXPERTS, gate(TaskScorer(EXPERTS)(tasks))))
    mixed = model.generate(texts[:, :8], max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, task in enumerate(tasks):
        compose.activate(model, task)
        alone = model.generate(texts[row : row + 1, :8], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(mixed[row], alone[0])


def test_soft_rows_are_weighted_sums(model, texts):
    weights = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    compose.activate(model, row_expressions(EXPERTS, weights))
    with torch.no_grad():
        mixed = model(input_ids=texts).logits
        for row, expr in enumerate(["0.25 * a + 0.75 * b", None, "0.5 * b + 0.5 * c"]):
            compose.activate(model, expr)
            assert torch.allclose(mixed[row], model(input_ids=texts[row : row + 1]).logits[0], atol=2e-5)
