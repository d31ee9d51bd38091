"""iPET (arXiv:2001.07676): the ensemble labels text for its own next generation, three times over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import compose
from train.errors import DataError
from train.fewshot.examples import Example
from train.fewshot.job import FewShotResult, Job
from train.fewshot.prompts.filled import prompt_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.recipes.label_words import scores_for
from train.fewshot.recipes.pet import Recipe, distil, ensemble_mean, facts_of, fitted, mean_of, members, plans
from train.fewshot.recipes.stages import Pipeline, Stage, Tensors
from train.fewshot.tuning.prompt_tuning import scores_of
from train.seeds import generator

__all__ = ["draw", "growth", "ipet", "most_likely", "quotas", "teachers"]


def growth(n: int, generation: int, factor: int = 5) -> int:
    """New examples of a generation (from 0): N factor^(g + 1) - N; the original N are added to them.

    Examples
    --------
    >>> growth(10, 0), growth(10, 1), growth(10, 2)
    (40, 240, 1240)
    """
    return int(n * factor ** (generation + 1) - n)


def quotas(labels: Sequence[str], count: int) -> dict[str, int]:
    """How many of `count` new examples each label gets: the ratio of the original ones, by largest remainder."""
    shares = Counter(labels)
    exact = {label: count * n / len(labels) for label, n in shares.items()}
    given = {label: int(x) for label, x in exact.items()}
    by_rest = sorted(exact, key=lambda label: (given[label] - exact[label], label))
    for label in by_rest[: count - sum(given.values())]:
        given[label] += 1
    return given


def teachers(model: int, models: int, random: torch.Generator, share: float = 0.25) -> list[int]:
    """Who labels for `model`: a random round(25%) of the other models, one at least."""
    others = [m for m in range(models) if m != model]
    count = max(1, round(share * len(others)))
    return [others[i] for i in torch.randperm(len(others), generator=random)[:count].tolist()] or [model]


def draw(
    logits: Tensor, labels: Sequence[str], wanted: dict[str, int], random: torch.Generator
) -> list[tuple[int, str]]:
    """Rows and their labels: argmax of softmax(mean logits), each label's share drawn without replacement.

    The probability of a row is proportional to its largest probability. A label that too few rows are given has all
    of them and no more: nothing loops, and nothing is labelled against the ensemble.
    """
    probability, guess = logits.softmax(-1).max(-1)
    drawn: list[tuple[int, str]] = []
    for c, label in enumerate(labels):
        rows = (guess == c).nonzero()[:, 0]
        count = min(wanted.get(label, 0), len(rows))
        if count:
            picked = torch.multinomial(probability[rows], count, replacement=False, generator=random)
            drawn += [(int(row), label) for row in rows[picked]]
    return drawn


def most_likely(logits: Tensor, labels: Sequence[str], count: int = 100) -> list[tuple[int, str]]:
    """The zero-shot start: for each label the `count` rows with its highest probability; a row may serve one label."""
    probabilities = logits.softmax(-1)
    taken: set[int] = set()
    chosen = []
    for c, label in enumerate(labels):
        order = [i for i in probabilities[:, c].argsort(descending=True, stable=True).tolist() if i not in taken]
        taken.update(order[:count])
        chosen += [(i, label) for i in order[:count]]
    return chosen


def ipet(job: Job, recipe: Recipe | None = None, generations: int = 3) -> FewShotResult:
    """IPET over the unlabelled texts, then distillation as in PET.

    Raises
    ------
    DataError
        No unlabelled texts; fewer than two patterns.
    """
    texts: Sequence[Example] = job.unlabeled
    if not texts:
        raise DataError("iPET labels unlabelled texts and there are none", hint="--unlabeled FILE")
    if len(job.patterns) < 2:
        raise DataError("iPET needs two patterns or more: models label for each other", hint="give --template twice")
    recipe, texts = fitted(job, recipe or Recipe(), texts, generations)
    scores = scores_for(job)
    pipeline = Pipeline(job.folder, job.say)
    last: tuple[str, ...] = ()
    for g in range(generations):
        last = (_generation(pipeline, job, scores, recipe, texts, g, last),)
    soft = pipeline.add(Stage("soft", {}, last, lambda found: {"logits": mean_of(found[last[0]])}))
    return distil(job, texts, pipeline.run(soft)[soft]["logits"], recipe, "ipet")


def _generation(
    pipeline: Pipeline,
    job: Job,
    scores: WordScores,
    recipe: Recipe,
    texts: Sequence[Example],
    g: int,
    before: tuple[str, ...],
) -> str:
    """Add the stage of a generation: a fresh adapter per pattern and repetition, all trained in one pass."""
    fresh = plans(job, recipe, job.examples, g)

    def run(found: Mapping[str, Tensors]) -> Tensors:
        said = [found[name][f"logits.{m}"] for name in before for m in range(len(fresh))]
        wanted = [replace(p, examples=_examples(job, scores, texts, said, g, m)) for m, p in enumerate(fresh)]
        return members(job, wanted, texts, scores, recipe)

    facts = {**facts_of(job, fresh, texts, scores, recipe), "generation": g}
    return pipeline.add(Stage(f"generation {g}", facts, before, run))


def _examples(
    job: Job, scores: WordScores, texts: Sequence[Example], said: Sequence[Tensor], g: int, m: int
) -> list[Example]:
    """What member m of generation g learns from: the original rows and, after the first, what others label for it."""
    own = list(job.examples)
    if not said and own:
        return own
    random = generator(job.seed, "ipet", g, m)
    if not said:  # no labelled row at all: start from what the bare base is surest of
        chosen = most_likely(_zero_shot(job, scores, texts), job.labels)
    else:
        asked = [said[t] for t in teachers(m, len(said), random)]
        count = min(growth(max(len(own), 1), g - 1), len(texts))
        ratio = [str(e.label) for e in own] or list(job.labels)
        chosen = draw(ensemble_mean(asked), job.labels, quotas(ratio, count), random)
    return own + [replace(texts[i], label=label) for i, label in chosen]


def _zero_shot(job: Job, scores: WordScores, texts: Sequence[Example]) -> Tensor:
    """(N, C) what the label words score in the first pattern, without any adapter."""
    data = prompt_dataset(Template.parse(job.patterns[0]), texts, job.tokenizer, job.labels, max_length=job.max_length)
    compose.activate(job.model, None)
    return scores_of(job.model, scores, data, precision=job.precision)
