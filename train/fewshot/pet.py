"""PET (arXiv:2001.07676, arXiv:2009.07118): an ensemble over patterns labels text softly, a classifier learns from it.

Stages: an adapter per pattern and repetition -> its logits on the unlabelled texts -> their mean -> a classifier
adapter by distillation. Every adapter sits on the one frozen base, so an ensemble is a set of small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import compose
from train.errors import DataError
from train.fewshot.examples import Example
from train.fewshot.head import fit_head
from train.fewshot.job import Job, Learned
from train.fewshot.prompts import prompt_dataset
from train.fewshot.refine import refine
from train.fewshot.replay import blocks_of
from train.fewshot.stages import Pipeline, Stage, Tensors
from train.fewshot.template import Template
from train.fewshot.tuning import WithLM, accuracy, scores_of, tune
from train.fewshot.verbalizer import WordScores
from train.fewshot.views import View, view_dataset
from train.fewshot.words import scores_for

__all__ = ["Recipe", "distil", "ensemble_mean", "member", "pet"]

_LEAST_UNLABELED = 1


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


def ensemble_mean(logits: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Mean of raw logits (N, C) over the members: uniform, or weighted by accuracy before training.

    Weights are normalized to sum to one; if all are zero the mean is uniform.
    """
    shares = torch.ones(len(logits)) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    shares = torch.ones(len(logits)) if float(shares.sum()) == 0 else shares
    shares = shares / shares.sum()
    return torch.einsum("m,mnc->nc", shares, torch.stack(list(logits)))


def member(
    job: Job,
    template: str,
    examples: Sequence[Example],
    to_label: Sequence[Example],
    scores: WordScores,
    recipe: Recipe,
    seed: int,
) -> Tensors:
    """Train one adapter: its `logits` on `to_label` and its `accuracy` on the examples before training."""
    parsed = Template.parse(template)
    train = prompt_dataset(parsed, examples, job.tokenizer, job.labels, max_length=job.max_length)
    compose.activate(job.model, None)
    before = accuracy(scores_of(job.model, scores, train, precision=job.precision), train)
    name = "member"
    config = job.config(recipe.steps, seed=seed)
    blocks, method_of = recipe.blocks, None
    if recipe.lm_alpha is not None:
        plain = view_dataset(None, to_label, job.tokenizer, job.labels, max_length=job.max_length)
        alpha, blocks = recipe.lm_alpha, len(blocks_of(job.model) or ())
        method_of = partial(WithLM, data=plain, tokenizer=job.tokenizer, alpha=alpha, seed=seed)
    tune(job.model, scores, train, config, name=name, blocks=blocks, method_of=method_of)
    texts = prompt_dataset(parsed, to_label, job.tokenizer, job.labels, max_length=job.max_length)
    logits = scores_of(job.model, scores, texts, precision=job.precision)
    compose.activate(job.model, None)
    compose.detach(job.model, name)
    return {"logits": logits, "accuracy": torch.tensor([before])}


def distil(job: Job, texts: Sequence[Example], soft: Tensor, recipe: Recipe, method: str) -> Learned:
    """A classifier adapter from soft labels: `texts` with the ensemble's (N, C) logits."""
    views = (View(), View(job.patterns[0], "mask"))
    classifier = job.classifier(views)
    compose.activate(job.model, None)
    features = classifier.features(texts)
    config = job.config(recipe.distil_steps, batch=32)
    refined = refine(
        job.model,
        job.tokenizer,
        views,
        texts,
        features,
        job.labels,
        config,
        name="fewshot",
        blocks=recipe.blocks,
        max_length=job.max_length,
        soft=soft,
        seconds=max(job.left, 5.0),
    )
    classifier.head = fit_head(classifier.features(texts), soft.softmax(-1), len(job.labels), 1.0)
    facts = {"templates": list(job.patterns), "unlabeled": len(texts), "repetitions": recipe.repetitions}
    return Learned(classifier, refined.adapter, method, config, refined.result, facts)


def pet(job: Job, recipe: Recipe | None = None, folder: Path | None = None) -> Learned:
    """PET; without unlabelled texts the examples themselves are distilled on."""
    recipe = recipe or Recipe()
    texts = list(job.unlabeled or job.examples)
    if len(texts) < _LEAST_UNLABELED:
        raise DataError("PET distils on unlabelled texts and there are none", hint="--unlabeled FILE")
    scores = scores_for(job)
    pipeline = Pipeline(folder, job.say)
    names = add_members(pipeline, job, scores, recipe, list(job.examples), texts, generation=0)
    pipeline.add(Stage("soft", {"weighted": recipe.weighted}, tuple(names), lambda r: soften(r, recipe.weighted)))
    soft = pipeline.run("soft")["soft"]["logits"]
    return distil(job, texts, soft, recipe, "pet")


def add_members(
    pipeline: Pipeline,
    job: Job,
    scores: WordScores,
    recipe: Recipe,
    examples: Sequence[Example],
    texts: Sequence[Example],
    generation: int,
) -> list[str]:
    """A stage for every pattern and repetition."""
    names = []
    for p, template in enumerate(job.patterns):
        for r in range(recipe.repetitions):
            seed = job.seed + 1000 * r + 100_000 * generation
            facts = {
                "base": job.base,
                "template": template,
                "words": scores.ids,
                "seed": seed,
                "recipe": vars(recipe),
                "rows": [(*e.key, str(e.label)) for e in examples],
                "texts": [e.key for e in texts],
            }

            def run(_needs: Mapping[str, Tensors], template: str = template, seed: int = seed) -> Tensors:
                return member(job, template, examples, texts, scores, recipe, seed)

            names.append(pipeline.add(Stage(f"generation {generation}, pattern {p}, run {r}", facts, (), run)))
    return names


def soften(results: Mapping[str, Tensors], weighted: bool) -> Tensors:
    """The ensemble's logits."""
    weights = [float(r["accuracy"]) for r in results.values()] if weighted else None
    return {"logits": ensemble_mean([r["logits"] for r in results.values()], weights)}
