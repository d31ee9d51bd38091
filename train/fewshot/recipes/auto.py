"""What `hub few-shot` does unless told otherwise: a mixture of readings of the bare base and of an adapted one.

1. The base reads every example plainly and in a few templates: one pass, kept. A convex head starts from what the
   labels' own words say at the masks and learns from all views. Pairs are also read by how well their texts agree.
2. With time left, a LoRA on the upper blocks is trained (see `adapt`); it is read by the label words and by a head.
3. Each is asked about rows it has not learned from (halves of the examples); the shares of the mixture maximize the
   likelihood of those answers. What has next to no share is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import compose
from train.errors import TrainError
from train.fewshot.classifier.classifier import head_member
from train.fewshot.classifier.members import Member
from train.fewshot.job import FewShotResult, Job
from train.fewshot.prompts.verbalizer import VerbalizerError, WordScores
from train.fewshot.reading.head import Head, HeadChoice, choose_head, fit_head, words_alone
from train.fewshot.reading.views import Features, View
from train.fewshot.recipes.adapt import MANY, adapt
from train.fewshot.recipes.label_words import find_words
from train.fewshot.splits import folds
from train.fewshot.tuning.prompt_tuning import TunedAdapter
from train.result import FitResult

__all__ = ["auto", "feature", "stack", "views_of", "zero_shot"]

MemberAndTensors: TypeAlias = tuple[Member, Mapping[str, Tensor]]

_LEAST = 0.05  # share of a member that is worth its passes at prediction
# How much each member is believed beforehand, in held-out rows; 1 where nothing is said. Four numbers a pair overfit a
# few examples less than vectors do, which is more than the few held-out rows can tell.
_BELIEF = {"match": 8.0}
_PLAIN_PENALTY = 1.0


def views_of(job: Job) -> tuple[View, ...]:
    """The plain text, and each template read at its mask and as a whole."""
    if not job.masked:
        return (View(None, "mean"), View(None, "last"))
    return (View(), *(View(t, pool) for t in job.patterns for pool in ("mask", "mean")))


def zero_shot(job: Job) -> FewShotResult:
    """The label words alone: nothing is learned from the examples but each template's mean logits."""
    if not job.spoken:
        raise TrainError("the labels' names say nothing this base reads", hint="give words: --word LABEL=WORD")
    views = _masks(job)
    adapter = job.identity()
    compose.activate(job.model, None)
    head = Head((), -job.features(views).prior.mean(1).mean(0), words_alone(len(job.labels)).strength)
    facts = {"templates": list(job.patterns)}
    return FewShotResult(
        job.headed(views, head, adapted=False), adapter, "zero-shot", job.config(1), FitResult(), facts
    )


def feature(job: Job) -> FewShotResult:
    """The bare base, and a head on each reading of it."""
    bare = _BaseReadings.read(job, 0.8 * job.left)
    return _learned(job, "feature", bare, bare.members(job), bare.shares(job))


def auto(job: Job) -> FewShotResult:
    """The mixture; of the bare base's readings alone, where there is no time for more."""
    bare = _BaseReadings.read(job, 0.25 * job.left)
    job.say(f"the bare base: cross-validated accuracy {bare.accuracy(job):.3f}, {job.left:.0f} s left")
    scores = _words(job)
    held_out = _held_out(job, bare, scores) if job.left > 0.3 * job.budget else None
    if held_out is None:
        return _learned(job, "auto", bare, bare.members(job), bare.shares(job))
    said, answers = held_out
    shares = _shares(said, answers)
    job.say("shares: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    members, tuned = bare.members(job), None
    if not shares.keys() <= members.keys():
        tuned = adapt(job, range(len(job.examples)), scores, name="fewshot", seconds=0.9 * job.left)
        members |= _adapted(job, scores, job.features([View()]), job.answers)
    nats = {name: round(float(F.nll_loss(own, answers)), 4) for name, own in said.items()}
    return _learned(job, "auto", bare, members, shares, tuned, held_out_nats=nats)


def stack(held_out: Tensor, answers: Tensor, belief: Tensor | None = None) -> Tensor:
    """(M,) shares w of the mixture `log p = log_softmax(sum_m w_m log p_m)`.

    `held_out` (M, N, C) are log p_m of rows that no member learned from, `answers` (N,), `belief` (M,).

    They maximize `sum_i log p(y_i) + sum_m b_m log w_m`: the likelihood of held-out answers under a Dirichlet(1 + b)
    prior, b = 1 by default, which keeps every share away from zero while there is little to go by.
    """
    belief = torch.ones(len(held_out)) if belief is None else belief
    free = torch.zeros(len(held_out), requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        log_w = free.log_softmax(0)
        mixed = torch.einsum("m,mnc->nc", log_w.exp(), held_out).log_softmax(-1)
        loss = F.nll_loss(mixed, answers, reduction="sum") - belief @ log_w
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return free.detach().softmax(0)


def _shares(held_out: Mapping[str, Tensor], answers: Tensor) -> dict[str, float]:
    """The share of each member that has one worth its passes; they sum to one."""
    belief = torch.tensor([_BELIEF.get(name, 1.0) for name in held_out])
    shares = stack(torch.stack(list(held_out.values())), answers, belief).tolist()
    named = {name: share for name, share in zip(held_out, shares, strict=True) if share >= _LEAST}
    return {name: share / sum(named.values()) for name, share in named.items()}


# -- the parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """Views of the bare base, what they saw, and the head chosen on that."""

    views: tuple[View, ...]
    features: Features
    choice: HeadChoice


class _BaseReadings(dict[str, _Reading]):
    """What is read of the bare base, each reading with a head of its own."""

    @classmethod
    def read(cls, job: Job, seconds: float) -> _BaseReadings:
        """All views in one reading and, of pairs, how well their texts agree in another."""
        compose.activate(job.model, None)
        readings = {"frozen": views_of(job)}
        if job.examples[0].text2 is not None:
            readings["match"] = (View(None, "match"),)
        rounds = 1 if len(job.labels) >= MANY else 2
        parts = [part for i in range(rounds) for part in folds(job.examples, 4, job.seed + i)]
        bare = cls()
        for name, views in readings.items():
            features = job.features(views)
            choice = choose_head(features, job.answers, len(job.labels), parts, seconds=seconds)
            bare[name] = _Reading(views, features, choice)
        return bare

    def members(self, job: Job) -> dict[str, MemberAndTensors]:
        """The member of each reading."""
        return {
            name: head_member(reading.views, reading.choice.head, job.spoken, adapted=False)
            for name, reading in self.items()
        }

    def _held(self) -> tuple[dict[str, Tensor], Tensor]:
        """Cross-validated log probabilities (n, C) of each reading, and which n rows have them in all."""
        seen = torch.stack([reading.choice.seen for reading in self.values()]).all(0)
        return {name: reading.choice.held[seen].log_softmax(-1) for name, reading in self.items()}, seen

    def shares(self, job: Job) -> dict[str, float]:
        """The shares that cross-validation gives the readings."""
        held_out, seen = self._held()
        return _shares(held_out, job.answers[seen])

    def accuracy(self, job: Job) -> float:
        """Cross-validated accuracy of all readings together."""
        held_out, seen = self._held()
        mixed = sum(share * held_out[name] for name, share in self.shares(job).items())
        return float((torch.as_tensor(mixed).argmax(1) == job.answers[seen]).double().mean())


def _held_out(job: Job, bare: _BaseReadings, scores: WordScores | None) -> tuple[dict[str, Tensor], Tensor] | None:
    """(n, C) log probabilities of each member for rows it did not learn from, and these rows' answers (n,).

    None where that takes too long. With many classes one half of the examples says enough.
    """
    # The base's readings cost no training: their heads are cross-validated on the features that are there.
    classes, halves = len(job.labels), folds(job.examples, 2, job.seed)
    halves = halves[:1] if classes >= MANY else halves
    said = {n: choose_head(r.features, job.answers, classes, halves).held.log_softmax(-1) for n, r in bare.items()}
    for turn, part in enumerate(halves):
        started, out = time.perf_counter(), torch.tensor(part)
        rest = [i for i in range(len(job.examples)) if i not in set(part)]
        # The adapter is trained anew on the other half, for a share of the time that is left.
        adapt(job, rest, scores, name="trial", seconds=job.left / 3)
        plain = job.features([View()], [job.examples[i] for i in rest])
        # What its members say of the rows it has not seen.
        asked, trial = [job.examples[i] for i in part], replace(job.reading, adapter="trial")
        for name, (member, tensors) in _adapted(job, scores, plain, job.answers[rest]).items():
            logits = member.logits(trial, asked, tensors)
            said.setdefault(name, torch.zeros(len(job.examples), classes))[out] = logits.log_softmax(-1)
        compose.activate(job.model, None)
        compose.detach(job.model, "trial")
        if job.left < (len(halves) - turn) * (time.perf_counter() - started):  # as long for each half, and for all
            job.say("no time is left for adapting")
            return None
    rows = torch.tensor(sorted(i for part in halves for i in part))
    return {name: own[rows] for name, own in said.items()}, job.answers[rows]


def _adapted(job: Job, scores: WordScores | None, plain: Features, answers: Tensor) -> dict[str, MemberAndTensors]:
    """Members that read the adapter; `plain` and `answers` are of the rows it learned from."""
    classes = len(job.labels)
    head = fit_head(plain, answers, classes, _PLAIN_PENALTY, prior=False)
    members: dict[str, MemberAndTensors] = {"contrast": head_member([View()], head, ())}
    if scores is not None:
        members["words"] = head_member(_masks(job), words_alone(classes), scores.ids)
    return members


def _words(job: Job) -> WordScores | None:
    """The label words: given, of the labels' names, or found by the model; None where there are none or too many."""
    if not job.masked or len(job.labels) >= MANY:
        return None
    if job.spoken:
        return WordScores(job.spoken)
    try:
        return find_words(job, job.patterns[0])[0]
    except VerbalizerError as error:
        job.say(f"no label words: {error}")
        return None


def _masks(job: Job) -> tuple[View, ...]:
    return tuple(View(template, "mask") for template in job.patterns)


def _learned(
    job: Job,
    method: str,
    bare: _BaseReadings,
    members: Mapping[str, MemberAndTensors],
    shares: Mapping[str, float],
    tuned: TunedAdapter | None = None,
    **more: Any,
) -> FewShotResult:
    """The classifier of the members that have a share; without a trained adapter it stores one that changes nothing."""
    words = {
        lb: job.tokenizer.convert_ids_to_tokens(list(ids)) for lb, ids in zip(job.labels, job.spoken, strict=False)
    }
    facts = {
        "templates": list(job.patterns),
        "label_words": words,
        "views": sum(len(reading.views) for reading in bare.values()),
        "cross_validated_accuracy": round(bare.accuracy(job), 4),
        "shares": {name: round(share, 4) for name, share in shares.items()},
        **more,
    }
    adapter = job.identity() if tuned is None else tuned.adapter
    classifier = job.classifier(*(members[name] for name in shares), shares=list(shares.values()))
    if tuned is None:
        return FewShotResult(classifier, adapter, method, job.config(1), FitResult(), facts)
    return FewShotResult(classifier, adapter, method, tuned.config, tuned.result, facts)
