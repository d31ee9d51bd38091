"""What `hub few-shot` does unless told otherwise: heads over frozen views, refined when that predicts better.

1. The base reads every example plainly and in a few templates: one pass, kept.
2. A convex head starts from what the labels' own words say at the masks and learns from all views; its strength is
   chosen, and averaged, by cross-validation inside the examples.
3. With time left, a LoRA on the upper blocks is trained on half of the examples; if it predicts the other half better
   than the frozen head does, by more than one standard error, it is trained on all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import compose
from train.errors import TrainError
from train.fewshot.head import choose_head, fit_head, words_alone
from train.fewshot.job import Job, Learned
from train.fewshot.refine import Refined, refine
from train.fewshot.splits import folds
from train.fewshot.views import Features, View
from train.loop import FitResult

__all__ = ["auto", "feature", "views_of", "zero_shot"]

_MANY = 10  # classes from which one round of cross-validation is enough
_STEPS = 40
_REFINED_PENALTY = 4.0


def views_of(job: Job) -> tuple[View, ...]:
    """The plain text, and each template read at its mask and as a whole."""
    if not job.masked:
        return (View(None, "mean"), View(None, "last"))
    return (View(), *(View(t, pool) for t in job.patterns for pool in ("mask", "mean")))


def zero_shot(job: Job) -> Learned:
    """The label words alone: nothing is learned from the examples but each template's mean logits."""
    if not job.spoken:
        raise TrainError("the labels' names say nothing this base reads", hint="give words: --word LABEL=WORD")
    views = tuple(View(t, "mask") for t in job.patterns)
    adapter = job.identity()
    classifier = job.classifier(views)
    prior = classifier.features(job.examples).prior.mean(1).mean(0)
    classifier.head = type(classifier.head)((), -prior, words_alone(len(job.labels)).strength)
    return Learned(classifier, adapter, "zero-shot", job.config(1), FitResult(), {"templates": list(job.patterns)})


def feature(job: Job) -> Learned:
    """The frozen views and their head."""
    views = views_of(job)
    classifier = job.classifier(views)
    features = classifier.features(job.examples)
    head, accuracy = choose_head(features, job.answers, len(job.labels), _parts(job))
    classifier.head = head
    adapter = job.identity()
    facts = _facts(job, views, accuracy, refined=False)
    return Learned(classifier, adapter, "feature", job.config(1), FitResult(), facts)


def auto(job: Job) -> Learned:
    """The best of frozen and refined, by held-out likelihood inside the examples."""
    views = views_of(job)
    classifier = job.classifier(views)
    features = classifier.features(job.examples)
    head, accuracy = choose_head(features, job.answers, len(job.labels), _parts(job))
    job.say(f"frozen views: cross-validated accuracy {accuracy:.3f}, {job.left:.0f} s left")
    chosen = _refined(job, views, features) if job.left > 0.3 * job.budget else None
    if chosen is None:
        classifier.head, adapter = head, job.identity()
        facts = _facts(job, views, accuracy, refined=False)
        return Learned(classifier, adapter, "auto", job.config(1), FitResult(), facts)
    refined, gain = chosen
    after = classifier.features(job.examples)
    classifier.head = fit_head(after, job.answers, len(job.labels), _REFINED_PENALTY)
    facts = {**_facts(job, views, accuracy, refined=True), "held_out_gain_nats": round(gain, 4)}
    return Learned(classifier, refined.adapter, "auto", job.config(_STEPS), refined.result, facts)


def _refined(job: Job, views: Sequence[View], features: Features) -> tuple[Refined, float] | None:
    """Train on half, compare on the other half; on all if that was better and there is time."""
    started = time.perf_counter()
    half, rest = folds(job.examples, 2, job.seed)
    few = views[:2]
    share = job.left / 3
    name = "trial"
    _train(job, few, features, half, name, seconds=share)
    after = job.classifier(views).features(job.examples)
    compose.activate(job.model, None)
    compose.detach(job.model, name)
    classes, answers = len(job.labels), job.answers

    def losses(seen: Features) -> Tensor:
        head = fit_head(seen.select(half), answers[half], classes, _REFINED_PENALTY)
        return F.cross_entropy(head(seen.select(rest)), answers[rest], reduction="none")

    gains = losses(features) - losses(after)
    gain, error = float(gains.mean()), float(gains.std()) / len(rest) ** 0.5
    took = time.perf_counter() - started
    job.say(f"refining gains {gain:+.3f} ± {error:.3f} nats on held-out examples ({took:.0f} s)")
    if gain <= error or job.left < took:
        return None
    return _train(job, few, features, range(len(job.examples)), "fewshot", seconds=job.left * 0.8), gain


def _train(
    job: Job, views: Sequence[View], features: Features, rows: Sequence[int], name: str, seconds: float
) -> Refined:
    seen = Features(features.states[: len(views)], features.prior).select(list(rows))
    examples = [job.examples[i] for i in rows]
    options: dict[str, Any] = {"name": name, "max_length": job.max_length, "seconds": seconds}
    batch = 32 if len(job.labels) >= _MANY else 16
    return refine(
        job.model, job.tokenizer, views, examples, seen, job.labels, job.config(_STEPS, batch=batch), **options
    )


def _parts(job: Job) -> list[list[int]]:
    rounds = 1 if len(job.labels) >= _MANY else 2
    return [part for i in range(rounds) for part in folds(job.examples, 4, job.seed + i)]


def _facts(job: Job, views: Sequence[View], accuracy: float, *, refined: bool) -> dict[str, Any]:
    words = {
        lb: job.tokenizer.convert_ids_to_tokens(list(ids)) for lb, ids in zip(job.labels, job.spoken, strict=False)
    }
    return {
        "templates": list(job.patterns),
        "label_words": words,
        "views": len(views),
        "cross_validated_accuracy": round(accuracy, 4),
        "refined": refined,
    }


def accuracy_of(logits: Tensor, answers: Tensor) -> float:
    """Share of rows whose highest logit is the right one."""
    return float((logits.argmax(1) == answers).double().mean()) if len(answers) else torch.nan
