"""What `hub few-shot` does unless told otherwise: a mixture of readings of the bare base and of an adapted one.

1. The base reads every example plainly and, where it fills masks, in a few templates: one pass, kept. Convex heads
   start from what the labels' own words say (see `readings`) and learn from all views.
2. With budget left, a LoRA is trained (see `adapt`); it is read by a head and, where there are masks, by label words.
3. Each is asked about rows it has not learned from (halves of the examples), cooled to be as sure as it is right there
   (see `weighing`), and mixed: the shares maximize the likelihood of those answers. What has next to no share is left
   out.

What fits into the budget is counted, not timed (see `work`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import compose
from train.errors import TrainError
from train.fewshot.classifier.classifier import head_member
from train.fewshot.job import FewShotResult, Job
from train.fewshot.prompts.verbalizer import VerbalizerError, WordScores
from train.fewshot.reading.head import Head, fit_head, words_alone
from train.fewshot.reading.views import View
from train.fewshot.reading.weighing import cooled
from train.fewshot.recipes.adapt import MANY, Plan, adapt
from train.fewshot.recipes.label_words import find_words
from train.fewshot.recipes.readings import BareReadings, MemberAndTensors, masks_of, names_of, with_names
from train.fewshot.splits import folds
from train.fewshot.tuning.prompt_tuning import TunedAdapter
from train.result import FitResult

__all__ = ["auto", "feature", "stack", "zero_shot"]

_LEAST = 0.05  # share of a member that is worth its passes at prediction
# How much each member is believed beforehand, in held-out rows; 1 where nothing is said. Four numbers a pair overfit a
# few examples less than vectors do, which is more than the few held-out rows can tell.
_BELIEF = {"match": 8.0}
_PLAIN_PENALTY = 1.0


def zero_shot(job: Job) -> FewShotResult:
    """The label words alone: nothing is learned from the examples but each template's mean logits."""
    if not job.spoken:
        raise TrainError("the labels' names say nothing this base reads", hint="give words: --word LABEL=WORD")
    views = masks_of(job)
    adapter = job.identity()
    compose.activate(job.model, None)
    head = Head((), -job.features(views).prior.mean(1).mean(0), words_alone(len(job.labels)).strength)
    facts = {"templates": list(job.patterns)}
    return FewShotResult(
        job.headed(views, head, adapted=False), adapter, "zero-shot", job.config(1), FitResult(), facts
    )


def feature(job: Job) -> FewShotResult:
    """The bare base, and a head on each reading of it."""
    bare = BareReadings.read(job)
    said, answers = bare.held_out(job)
    return _learned(job, "feature", bare, bare.members(job), said, answers)


def auto(job: Job) -> FewShotResult:
    """The mixture; of the bare base's readings alone, where the budget has no room for more."""
    scores = _words(job)
    halves = folds(job.examples, 2, job.seed)
    halves = halves[:1] if len(job.labels) >= MANY else halves  # of many classes one half of the examples says enough
    plan = Plan.of(job, scores, [len(job.examples) - len(part) for part in halves])
    bare = BareReadings.read(job)
    members = bare.members(job)
    if not plan.steps:
        job.say("the budget has no room for adapting")
        said, answers = bare.held_out(job)
        return _learned(job, "auto", bare, members, said, answers)
    said, answers = _trials(job, bare, scores, halves, plan)
    scales = {name: cooled(own, answers) for name, own in said.items()}
    said = {name: (scales[name] * own).log_softmax(-1) for name, own in said.items()}
    shares = _shares(said, answers)
    job.say("shares: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    tuned = None
    if not shares.keys() <= members.keys():
        tuned = adapt(job, range(len(job.examples)), scores, name="fewshot", steps=plan.steps)
        members |= _adapted(job, scores, range(len(job.examples)))
    members = {name: _scaled(*member, scales.get(name, 1.0)) for name, member in members.items()}
    return _learned(job, "auto", bare, members, said, answers, tuned, steps=plan.steps, trials=list(plan.trials))


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


def nested_accuracy(held_out: Mapping[str, Tensor], answers: Tensor, parts: int = 4) -> float:
    """Share of right answers of the mixture, where the shares for each fold are those that the other folds give."""
    hits = 0
    for part in range(parts):
        out = torch.arange(len(answers)) % parts == part
        if not bool(out.any()) or bool(out.all()):
            continue
        shares = _shares({name: own[~out] for name, own in held_out.items()}, answers[~out])
        mixed = sum((share * held_out[name][out] for name, share in shares.items()), torch.zeros(()))
        hits += int((mixed.argmax(1) == answers[out]).sum())
    return hits / len(answers)


# -- the parts --------------------------------------------------------------------------------------------------------


def _trials(
    job: Job, bare: BareReadings, scores: WordScores | None, halves: list[list[int]], plan: Plan
) -> tuple[dict[str, Tensor], Tensor]:
    """(n, C) logits of each member for rows it did not learn from, and these rows' answers (n,)."""
    classes = len(job.labels)
    # The base's readings cost no training: their heads are cross-validated on the features that are there.
    said = bare.held(job, halves)
    for part, steps in zip(halves, plan.trials, strict=True):
        # The adapter is trained anew on the other half; what its members say of the rows it has not seen.
        out, rest = torch.tensor(part), [i for i in range(len(job.examples)) if i not in set(part)]
        adapt(job, rest, scores, name="trial", steps=steps)
        asked, trial = [job.examples[i] for i in part], replace(job.reading, adapter="trial")
        for name, (member, tensors) in _adapted(job, scores, rest).items():
            logits = member.logits(trial, asked, tensors)
            said.setdefault(name, torch.zeros(len(job.examples), classes))[out] = logits
        compose.activate(job.model, None)
        compose.detach(job.model, "trial")
    rows = torch.tensor(sorted(i for part in halves for i in part))
    return {name: own[rows] for name, own in said.items()}, job.answers[rows]


def _adapted(job: Job, scores: WordScores | None, rows: Any) -> dict[str, MemberAndTensors]:
    """Members that read the adapter which is active; `rows` are those it learned from."""
    classes, names = len(job.labels), names_of(job)
    plain = job.features([View()], [job.examples[i] for i in rows])
    plain = plain if names is None else with_names(plain, names)
    head = fit_head(plain, job.answers[torch.tensor(list(rows))], classes, _PLAIN_PENALTY, prior=names is not None)
    head = head if names is None else names.folded(head)
    members: dict[str, MemberAndTensors] = {"contrast": head_member([View()], head, ())}
    if scores is not None:
        members["words"] = head_member(masks_of(job), words_alone(classes), scores.ids)
    return members


def _scaled(member: Any, tensors: Mapping[str, Tensor], scale: float) -> MemberAndTensors:
    """The member with its logits times a factor."""
    return member.model_copy(update={"strength": member.strength * scale}), {n: scale * t for n, t in tensors.items()}


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


def _learned(
    job: Job,
    method: str,
    bare: BareReadings,
    members: Mapping[str, MemberAndTensors],
    said: Mapping[str, Tensor],
    answers: Tensor,
    tuned: TunedAdapter | None = None,
    **more: Any,
) -> FewShotResult:
    """The classifier of the members that have a share; without a trained adapter it stores one that changes nothing."""
    shares = _shares(said, answers)
    words = {
        lb: job.tokenizer.convert_ids_to_tokens(list(ids)) for lb, ids in zip(job.labels, job.spoken, strict=False)
    }
    facts = {
        "templates": list(job.patterns),
        "label_words": words,
        "views": sum(len(reading.views) for reading in bare.values()),
        "cross_validated_accuracy": round(nested_accuracy(said, answers), 4),
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "held_out_nats": {name: round(float(F.nll_loss(own, answers)), 4) for name, own in said.items()},
        "budget": job.budget_facts(),
        **more,
    }
    adapter = job.identity() if tuned is None else tuned.adapter
    classifier = job.classifier(*(members[name] for name in shares), shares=list(shares.values()))
    if tuned is None:
        return FewShotResult(classifier, adapter, method, job.config(1), FitResult(), facts)
    return FewShotResult(classifier, adapter, method, tuned.config, tuned.result, facts)
