"""What `hub few-shot` does unless told otherwise: a mixture of a frozen and an adapted reading of the examples.

1. The base reads every example plainly and in a few templates: one pass, kept. A convex head starts from what the
   labels' own words say at the masks and learns from all views.
2. With time left, a LoRA on the upper blocks is trained (see `adapt`); it is read by the label words and by a head.
3. Each is asked about rows it has not learned from (halves of the examples); the shares of the mixture maximize the
   likelihood of those answers. What has next to no share is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import compose
from train.errors import TrainError
from train.fewshot.adapt import MANY, adapt
from train.fewshot.classifier import head_member
from train.fewshot.head import Head, choose_head, fit_head, words_alone
from train.fewshot.job import Job, Learned
from train.fewshot.members import Member
from train.fewshot.splits import folds
from train.fewshot.verbalizer import VerbalizerError, WordScores
from train.fewshot.views import Features, View
from train.fewshot.words import find_words
from train.loop import FitResult

__all__ = ["auto", "feature", "stack", "views_of", "zero_shot"]

_LEAST = 0.05  # share of a member that is worth its passes at prediction
_PLAIN_PENALTY = 1.0


def views_of(job: Job) -> tuple[View, ...]:
    """The plain text, and each template read at its mask and as a whole."""
    if not job.masked:
        return (View(None, "mean"), View(None, "last"))
    return (View(), *(View(t, pool) for t in job.patterns for pool in ("mask", "mean")))


def zero_shot(job: Job) -> Learned:
    """The label words alone: nothing is learned from the examples but each template's mean logits."""
    if not job.spoken:
        raise TrainError("the labels' names say nothing this base reads", hint="give words: --word LABEL=WORD")
    views = _masks(job)
    adapter = job.identity()
    compose.activate(job.model, None)
    head = Head((), -job.features(views).prior.mean(1).mean(0), words_alone(len(job.labels)).strength)
    facts = {"templates": list(job.patterns)}
    return Learned(job.headed(views, head, adapted=False), adapter, "zero-shot", job.config(1), FitResult(), facts)


def feature(job: Job) -> Learned:
    """The frozen views and their head."""
    frozen = _frozen(job, 0.8 * job.left)
    return _frozen_alone(job, frozen, "feature")


def auto(job: Job) -> Learned:
    """The mixture, or the frozen views alone where there is no time for more."""
    frozen = _frozen(job, 0.25 * job.left)
    job.say(f"frozen views: cross-validated accuracy {frozen.accuracy:.3f}, {job.left:.0f} s left")
    scores = _words(job)
    held = _held_out(job, frozen, scores) if job.left > 0.3 * job.budget else None
    if held is None:
        return _frozen_alone(job, frozen, "auto")
    shares = stack(torch.stack(list(held.values())), job.answers)
    named = {name: share for name, share in zip(held, shares.tolist(), strict=True) if share >= _LEAST}
    shares_of = {name: share / sum(named.values()) for name, share in named.items()}
    job.say("shares: " + ", ".join(f"{name} {share:.2f}" for name, share in shares_of.items()))
    if list(shares_of) == ["frozen"]:
        return _frozen_alone(job, frozen, "auto")
    tuned = adapt(job, range(len(job.examples)), scores, name="fewshot", seconds=0.9 * job.left)
    made = {"frozen": frozen.member, **_adapted(job, scores, job.features([View()]), job.answers)}
    classifier = job.classifier(*(made[name] for name in shares_of), shares=list(shares_of.values()))
    facts = {
        **_facts(job, frozen),
        "shares": {name: round(share, 4) for name, share in shares_of.items()},
        "held_out_nats": {n: round(float(F.nll_loss(said, job.answers)), 4) for n, said in held.items()},
    }
    return Learned(classifier, tuned.adapter, "auto", tuned.config, tuned.result, facts)


def stack(held: Tensor, answers: Tensor) -> Tensor:
    """(M,) shares w of the mixture log p = log_softmax(sum_m w_m log p_m); held (M, N, C), answers (N,).

    They maximize sum_i log p(y_i) + sum_m log w_m: the likelihood of held-out answers under a Dirichlet(2, ...) prior,
    which keeps every share away from zero while there is little to go by.
    """
    free = torch.zeros(len(held), requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        log_w = free.log_softmax(0)
        mixed = torch.einsum("m,mnc->nc", log_w.exp(), held).log_softmax(-1)
        loss = F.nll_loss(mixed, answers, reduction="sum") - log_w.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return free.detach().softmax(0)


# -- the parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frozen:
    """The frozen views: what they saw, and the member made of them."""

    features: Features
    views: tuple[View, ...]
    member: tuple[Member, Mapping[str, Tensor]]
    accuracy: float  # cross-validated


def _frozen(job: Job, seconds: float) -> _Frozen:
    compose.activate(job.model, None)
    views, classes = views_of(job), len(job.labels)
    features = job.features(views)
    rounds = 1 if classes >= MANY else 2
    parts = [part for i in range(rounds) for part in folds(job.examples, 4, job.seed + i)]
    choice = choose_head(features, job.answers, classes, parts, seconds=seconds)
    member = head_member(views, choice.head, job.spoken, adapted=False)
    return _Frozen(features, views, member, choice.accuracy(job.answers))


def _frozen_alone(job: Job, frozen: _Frozen, method: str) -> Learned:
    adapter = job.identity()
    return Learned(job.classifier(frozen.member), adapter, method, job.config(1), FitResult(), _facts(job, frozen))


def _held_out(job: Job, frozen: _Frozen, scores: WordScores | None) -> dict[str, Tensor] | None:
    """(N, C) log probabilities of each member for rows it did not learn from; None where that takes too long."""
    classes, halves = len(job.labels), folds(job.examples, 2, job.seed)
    held = {"frozen": choose_head(frozen.features, job.answers, classes, halves).held.log_softmax(-1)}
    for turn, part in enumerate(halves):
        started, out = time.perf_counter(), torch.tensor(part)
        rest = [i for i in range(len(job.examples)) if i not in set(part)]
        adapt(job, rest, scores, name="trial", seconds=job.left / 3)
        plain = job.features([View()], [job.examples[i] for i in rest])
        asked, trial = [job.examples[i] for i in part], replace(job.reading, adapter="trial")
        for name, (member, tensors) in _adapted(job, scores, plain, job.answers[rest]).items():
            logits = member.logits(trial, asked, tensors)
            held.setdefault(name, torch.zeros(len(job.examples), classes))[out] = logits.log_softmax(-1)
        compose.activate(job.model, None)
        compose.detach(job.model, "trial")
        if job.left < (len(halves) - turn) * (time.perf_counter() - started):  # as long for each half, and for all
            job.say("no time is left for adapting")
            return None
    return held


def _adapted(
    job: Job, scores: WordScores | None, plain: Features, answers: Tensor
) -> dict[str, tuple[Member, Mapping[str, Tensor]]]:
    """Members that read the adapter; `plain` and `answers` are of the rows it learned from."""
    classes = len(job.labels)
    head = fit_head(plain, answers, classes, _PLAIN_PENALTY, prior=False)
    found: dict[str, tuple[Member, Mapping[str, Tensor]]] = {"contrast": head_member([View()], head, ())}
    if scores is not None:
        found["words"] = head_member(_masks(job), words_alone(classes), scores.ids)
    return found


def _words(job: Job) -> WordScores | None:
    """The label words: given, of the labels' names, or found by the model; None where there are none or too many."""
    if job.spoken:
        return WordScores(job.spoken)
    if not job.masked or len(job.labels) >= MANY:
        return None
    try:
        return find_words(job, job.patterns[0])[0]
    except VerbalizerError as error:
        job.say(f"no label words: {error}")
        return None


def _masks(job: Job) -> tuple[View, ...]:
    return tuple(View(template, "mask") for template in job.patterns)


def _facts(job: Job, frozen: _Frozen) -> dict[str, Any]:
    words = {
        lb: job.tokenizer.convert_ids_to_tokens(list(ids)) for lb, ids in zip(job.labels, job.spoken, strict=False)
    }
    return {
        "templates": list(job.patterns),
        "label_words": words,
        "views": len(frozen.views),
        "cross_validated_accuracy": round(frozen.accuracy, 4),
    }
