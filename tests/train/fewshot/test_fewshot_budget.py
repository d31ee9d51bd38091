"""The budget is counted: what fits into it, and that an idle and a busy machine learn the same."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from hub.store import Store
from train.fewshot.examples import Columns, Example
from train.fewshot.job import learn, within_budget
from train.fewshot.recipes import auto as module
from train.fewshot.recipes.adapt import Plan
from train.fewshot.recipes.auto import nested_accuracy
from train.fewshot.recipes.ipet import ipet
from train.fewshot.recipes.pet import Recipe, fitted
from train.fewshot.run import Request, run
from train.seeds import generator

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_slow_clock_changes_nothing_that_is_published(review_file, masked_base, tmp_path, monkeypatch):
    """The same seed, the machine loaded or not: the same digest."""
    request = Request(review_file(60), masked_base, Columns(), k=16, publish="me/reviews", max_length=32, budget=2.0)
    first = run(request, store=Store(tmp_path / "a")).facts
    hours = iter(range(10**9))
    for clock in ("perf_counter", "monotonic", "process_time", "time"):
        monkeypatch.setattr(time, clock, lambda: 3600.0 * next(hours))
    second = run(request, store=Store(tmp_path / "b")).facts
    assert first["steps"] and first["digest"] == second["digest"]
    assert first["budget"] == second["budget"] and first["budget"]["seconds"] == 2.0


def test_the_plan_is_cut_to_the_budget_and_not_given_up(make_job, reviews_of):
    job = make_job(examples=tuple(reviews_of(32)), budget=1000.0)
    halves = [16, 16]
    whole = Plan.of(job, None, halves)
    assert 0 < job.work.spent < job.budget
    half = make_job(examples=tuple(reviews_of(32)), budget=job.work.spent / 2)
    less = Plan.of(half, None, halves)
    assert whole.steps / 3 < less.steps < whole.steps / 1.8 and half.work.spent <= half.budget
    assert half.work.left < 0.2 * half.budget  # what there is, is used
    assert Plan.of(make_job(examples=tuple(reviews_of(32)), budget=1e-3), None, halves) == Plan(0, ())


def test_the_budget_bounds_what_is_read(make_job, reviews_of):
    rows = (*reviews_of(400), Example("the very plot", None, "pos"))
    job = make_job(examples=rows, budget=1000.0)
    said: list[str] = []
    assert within_budget(job).examples == rows
    short = make_job(examples=rows, budget=job.work.spent / 2, say=said.append)
    bounded = within_budget(short)
    assert 60 < len(bounded.examples) < 140 and bounded.work.decided["rows"] == len(bounded.examples)
    assert abs(sum(e.label == "pos" for e in bounded.examples) / len(bounded.examples) - 0.5) < 0.03
    assert bounded.work.spent <= 0.51 * bounded.budget and f"of {len(rows)} rows" in said[0]
    assert len(within_budget(make_job(examples=rows, budget=1e-9)).examples) == 4  # two of each label


def test_every_stage_of_ipet_gives_up_the_same_share(make_job, reviews_of):
    texts = [Example(e.text) for e in reviews_of(40, 16)]
    recipe = Recipe(steps=40, distil_steps=60)
    job = make_job(unlabeled=tuple(texts), budget=1000.0)
    assert fitted(job, recipe, texts, 3)[0] == recipe
    short = make_job(unlabeled=tuple(texts), budget=job.work.spent / 4)
    less, read = fitted(short, recipe, texts, 3)
    assert 0 < less.steps < 20 and less.distil_steps / 60 == pytest.approx(less.steps / 40, abs=0.05)
    assert len(read) == 40 and short.work.spent <= short.budget * 1.01
    learned = ipet(replace(short, **{"say": lambda _line: None}), recipe, generations=3)
    assert learned.result.steps == learned.facts["budget"]["distil_steps"] == less.distil_steps


def test_the_accuracy_that_is_told_is_not_of_rows_that_chose_the_shares():
    """Two members of pure noise: whichever is luckier on all rows would be told with its luck."""
    random = generator(3, "noise")
    answers = torch.randint(2, (400,), generator=random)
    members = {name: torch.randn(400, 2, generator=random).log_softmax(-1) for name in "abcdefgh"}
    assert nested_accuracy(members, answers) == pytest.approx(0.5, abs=0.06)
    members["good"] = (4 * torch.nn.functional.one_hot(answers, 2).float()).log_softmax(-1)
    assert nested_accuracy(members, answers) > 0.95


def test_what_is_told_is_of_the_mixture_that_answers(make_job, reviews_of, monkeypatch):
    job = make_job(examples=tuple(reviews_of(32)))
    told: dict[str, torch.Tensor] = {}
    original = module.nested_accuracy

    def spy(said, answers):
        told.update(said)
        return original(said, answers)

    monkeypatch.setattr(module, "nested_accuracy", spy)
    learned = learn(job, "auto")
    assert set(learned.facts["shares"]) <= set(told) and "contrast" in told
    assert 0.5 < learned.facts["cross_validated_accuracy"] <= 1
