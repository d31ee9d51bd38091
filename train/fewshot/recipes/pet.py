"""PET (arXiv:2001.07676, arXiv:2009.07118): an ensemble over patterns labels text softly, a classifier learns from it.

Stages: an adapter per pattern and repetition, all trained in one pass -> their logits on the unlabelled texts -> their
mean -> a classifier adapter by distillation. Every adapter sits on the one frozen base: an ensemble is a few tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import compose
from train.data.batches import Dataset
from train.fewshot.examples import Example
from train.fewshot.job import FewShotResult, Job
from train.fewshot.prompts.filled import prompt_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.reading.head import fit_head
from train.fewshot.reading.reader import PromptModel
from train.fewshot.reading.replay import blocks_of
from train.fewshot.reading.views import View, view_dataset
from train.fewshot.recipes.label_words import scores_for
from train.fewshot.recipes.stages import Pipeline, Stage, Tensors
from train.fewshot.tuning.prompt_tuning import WithLM, accuracy, scores_of, tune, tune_many
from train.fewshot.tuning.refine import refine

__all__ = ["Plan", "Recipe", "distil", "ensemble_mean", "facts_of", "fitted", "mean_of", "members", "pet", "plans"]


@dataclass(frozen=True)
class Recipe:
    """Sizes of a PET run.

    With `lm_alpha` (the paper's is 0.9999) the loss is alpha CE + (1 - alpha) MLM on the unlabelled texts.
    """

    repetitions: int = 1
    steps: int = 40
    weighted: bool = False
    distil_steps: int = 60
    blocks: int = 3
    lm_alpha: float | None = None


@dataclass(frozen=True)
class Plan:
    """A member to train: its pattern, its rows and its seed."""

    template: str
    examples: Sequence[Example]
    seed: int


def fitted(
    job: Job, recipe: Recipe, texts: Sequence[Example], generations: int = 1
) -> tuple[Recipe, Sequence[Example]]:
    """The recipe and the unlabelled texts that the budget has room for: every stage gives up the same share.

    Half of the budget is for reading the texts, by every member of every generation and for what is distilled.
    """
    members = len(job.patterns) * recipe.repetitions * generations
    each = job.work.reading(job.tokens(texts) / len(texts)) * (members + 4)
    count = max(min(len(texts), int(job.left / 2 / each)), min(2 * len(job.labels), len(texts)))
    job.work.charge(count * each)
    step = job.work.step(job.tokens(job.examples) / len(job.examples) * 16, recipe.blocks) * members
    last = job.work.step(job.tokens(texts) / len(texts) * 32, recipe.blocks)
    share = min(1.0, job.left / (recipe.steps * step + recipe.distil_steps * last))
    steps, distil_steps = (max(2, int(share * n)) for n in (recipe.steps, recipe.distil_steps))
    job.work.charge(steps * step + distil_steps * last)
    job.work.decided |= {"steps": steps, "distil_steps": distil_steps, "texts": count}
    return replace(recipe, steps=steps, distil_steps=distil_steps), texts[:count]


def ensemble_mean(logits: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Mean of raw logits (N, C) over the members: uniform, or weighted by accuracy before training.

    Weights are normalized to sum to one; if all are zero the mean is uniform.
    """
    shares = torch.ones(len(logits)) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    shares = torch.ones(len(logits)) if float(shares.sum()) == 0 else shares
    shares = shares / shares.sum()
    return torch.einsum("m,mnc->nc", shares, torch.stack(list(logits)))


def plans(job: Job, recipe: Recipe, examples: Sequence[Example], generation: int = 0) -> list[Plan]:
    """A member for every pattern and repetition."""
    pairs = [(template, r) for template in job.patterns for r in range(recipe.repetitions)]
    return [Plan(template, examples, job.seed + 1000 * r + 100_000 * generation) for template, r in pairs]


def members(
    job: Job, wanted: Sequence[Plan], to_label: Sequence[Example], scores: WordScores, recipe: Recipe
) -> Tensors:
    """Train all members: `logits.m` (N, C) of each on `to_label`, and `accuracy` (M,) on their rows before training."""
    compose.activate(job.model, None)
    sets = [_prompts(job, plan.template, plan.examples) for plan in wanted]
    before = [accuracy(scores_of(job.model, scores, data, precision=job.precision), data) for data in sets]
    names = [f"member{m}" for m in range(len(wanted))]
    configs = [job.config(recipe.steps, seed=p.seed) for p in wanted]
    if recipe.lm_alpha is None:
        tune_many(job.model, scores, sets, configs, names=names, blocks=recipe.blocks)
    else:  # each step also reads other texts, of its own choice
        plain = view_dataset(None, to_label, job.tokenizer, job.labels, max_length=job.max_length)
        depth = len(blocks_of(job.model) or ())
        for data, config, name in zip(sets, configs, names, strict=True):
            lm = partial(WithLM, data=plain, tokenizer=job.tokenizer, alpha=recipe.lm_alpha, seed=config.seed)
            tune(job.model, partial(PromptModel, scores=scores), data, config, name=name, blocks=depth, method_of=lm)
    tensors = {"accuracy": torch.tensor(before)}
    for m, (plan, name) in enumerate(zip(wanted, names, strict=True)):
        compose.activate(job.model, name)
        texts = _prompts(job, plan.template, to_label)
        tensors[f"logits.{m}"] = scores_of(job.model, scores, texts, precision=job.precision)
    compose.activate(job.model, None)
    for name in names:
        compose.detach(job.model, name)
    return tensors


def _prompts(job: Job, template: str, examples: Sequence[Example]) -> Dataset:
    return prompt_dataset(Template.parse(template), examples, job.tokenizer, job.labels, max_length=job.max_length)


def facts_of(
    job: Job, wanted: Sequence[Plan], texts: Sequence[Example], scores: WordScores, recipe: Recipe
) -> dict[str, object]:
    """All that decides what these members say."""
    return {
        "base": job.base,
        "members": [(plan.template, plan.seed) for plan in wanted],
        "words": scores.ids,
        "recipe": vars(recipe),
        "max_length": job.max_length,
        "precision": job.precision,
        "rows": [(*e.key, str(e.label)) for e in wanted[0].examples],
        "texts": [e.key for e in texts],
    }


def distil(job: Job, texts: Sequence[Example], soft: Tensor, recipe: Recipe, method: str) -> FewShotResult:
    """A classifier adapter from soft labels: `texts` with the ensemble's (N, C) logits."""
    views = (View(), View(job.patterns[0], "mask"))
    compose.activate(job.model, None)
    config = job.config(recipe.distil_steps, batch=32)
    refined = refine(
        job.model,
        job.tokenizer,
        views,
        texts,
        job.features(views, texts),
        job.labels,
        config,
        name="fewshot",
        blocks=recipe.blocks,
        max_length=job.max_length,
        soft=soft,
    )
    head = fit_head(job.features(views, texts), soft.softmax(-1), len(job.labels), 1.0)
    facts = {"templates": list(job.patterns), "unlabeled": len(texts), "repetitions": recipe.repetitions}
    facts |= {"budget": job.budget_facts()}
    return FewShotResult(job.headed(views, head), refined.adapter, method, config, refined.result, facts)


def pet(job: Job, recipe: Recipe | None = None) -> FewShotResult:
    """PET; without unlabelled texts the examples themselves are distilled on."""
    recipe, texts = fitted(job, recipe or Recipe(), list(job.unlabeled or job.examples))
    scores = scores_for(job)
    wanted = plans(job, recipe, job.examples)

    pipeline = Pipeline(job.folder, job.say)
    facts = facts_of(job, wanted, texts, scores, recipe)
    pipeline.add(Stage("members", facts, (), lambda _: members(job, wanted, texts, scores, recipe)))
    weighted = recipe.weighted
    pipeline.add(Stage("soft", {}, ("members",), lambda found: {"logits": mean_of(found["members"], weighted)}))
    return distil(job, texts, pipeline.run("soft")["soft"]["logits"], recipe, "pet")


def mean_of(found: Tensors, weighted: bool = False) -> Tensor:
    """(N, C) the ensemble's logits."""
    said = [found[f"logits.{m}"] for m in range(len(found["accuracy"]))]
    return ensemble_mean(said, found["accuracy"].tolist() if weighted else None)
