"""What is read of the bare base: views with a head each, the labels' names among the texts, and how pairs agree.

A label's name is a text, too. With unit mean states h of a text and n_c of the names,

    prior_c = 10 (h . n_c)

is what the names say: a head starts from it as from label words at a mask (see `head`), and, being linear in h, it is
folded into the head that is kept. On encoders trained for likeness of sentences that is worth several labelled rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

import compose
from train.fewshot.classifier.classifier import head_member
from train.fewshot.classifier.members import Member
from train.fewshot.examples import Example
from train.fewshot.job import Job
from train.fewshot.prompts.defaults import name_words
from train.fewshot.reading.head import STEPS, Head, HeadChoice, choose_head
from train.fewshot.reading.views import Features, View
from train.fewshot.splits import folds

__all__ = [
    "NEARNESS",
    "BareReadings",
    "MemberAndTensors",
    "Names",
    "masks_of",
    "name_texts",
    "names_of",
    "views_of",
    "with_names",
]

MemberAndTensors: TypeAlias = tuple[Member, Mapping[str, Tensor]]

_FEWEST = 8  # steps of a fit: enough to tell the classes' directions
NEARNESS = 10.0  # of cosines to names: about the scale at which they are probabilities, before any example is seen


def views_of(job: Job) -> tuple[View, ...]:
    """The plain text, and each template read at its mask and as a whole; of a causal base the mean and the end."""
    if job.masked:
        return (View(), *(View(t, pool) for t in job.patterns for pool in ("mask", "mean")))
    return (View(),) if job.encoder else (View(), View(None, "last"))


def masks_of(job: Job) -> tuple[View, ...]:
    """Each template, read at its mask."""
    return tuple(View(template, "mask") for template in job.patterns)


def name_texts(job: Job) -> tuple[str, ...]:
    """The labels' names (or the words given for them) as texts; none where some label has none, and for pairs.

    A name says what one text is about; what two texts have to do with each other is in no text of its own.
    """
    if job.examples[0].text2 is not None or not job.encoder:
        return ()
    texts = [" ".join(job.words.get(label, ()) or name_words(label)) for label in job.labels]
    return tuple(texts) if all(texts) and len(set(texts)) == len(texts) else ()


@dataclass(frozen=True)
class Names:
    """The states (C, d) of the labels' names under whatever is active."""

    states: Tensor

    def folded(self, head: Head) -> Head:
        """The head of the plain view alone that gives the same logits without the names at hand."""
        weight = head.weights[0] + head.strength * NEARNESS * self.states.T
        return Head((weight, *head.weights[1:]), head.offset, 0.0)


def names_of(job: Job) -> Names | None:
    """The labels' names, read under whatever is active; None where they say nothing."""
    texts = name_texts(job)
    return Names(job.features([View()], [Example(text) for text in texts]).states[0]) if texts else None


def with_names(features: Features, names: Names) -> Features:
    """The features of the plain view with what the names say as their prior."""
    return Features(features.states, (NEARNESS * features.states[0] @ names.states.T)[:, None, :])


@dataclass(frozen=True)
class _Reading:
    """Views of the bare base, what they saw, and the head chosen on that."""

    views: tuple[View, ...]
    features: Features
    choice: HeadChoice
    names: Names | None = None


class BareReadings(dict[str, _Reading]):
    """What is read of the bare base, each reading with a head of its own."""

    @classmethod
    def read(cls, job: Job) -> Self:
        """All views in one reading; the plain text with the labels' names; of pairs, how well their texts agree."""
        compose.activate(job.model, None)
        names = names_of(job)
        readings: dict[str, tuple[tuple[View, ...], Names | None]] = {"frozen": (views_of(job), None)}
        if names is not None and not job.masked:
            readings = {"frozen": ((View(),), names)}
        elif names is not None:
            readings["names"] = ((View(),), names)
        if job.examples[0].text2 is not None:
            readings["match"] = ((View(None, "match"),), None)
        bare = cls()
        for name, (views, known) in readings.items():
            features = job.features(views)
            features = features if known is None else with_names(features, known)
            parts, steps = _folded(job, len(views))
            chosen = choose_head(features, job.answers, len(job.labels), parts, steps=steps)
            bare[name] = _Reading(views, features, chosen, known)
        return bare

    def members(self, job: Job) -> dict[str, MemberAndTensors]:
        """The member of each reading."""
        made: dict[str, MemberAndTensors] = {}
        for name, reading in self.items():
            head = reading.choice.head
            head = head if reading.names is None else reading.names.folded(head)
            made[name] = head_member(reading.views, head, job.spoken, adapted=False)
        return made

    def held(self, job: Job, parts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """(N, C) what heads that have not learned from a part say of it."""
        steps = job.work.decided["fit_steps"]
        fitted = {n: choose_head(r.features, job.answers, len(job.labels), parts, steps=steps) for n, r in self.items()}
        return {name: choice.held for name, choice in fitted.items()}

    def held_out(self, job: Job) -> tuple[dict[str, Tensor], Tensor]:
        """Cross-validated log probabilities (n, C) of each reading, and the answers (n,) of these rows."""
        seen = torch.stack([reading.choice.seen for reading in self.values()]).all(0)
        return {name: r.choice.held[seen].log_softmax(-1) for name, r in self.items()}, job.answers[seen]


def _folded(job: Job, views: int) -> tuple[list[list[int]], int]:
    """Folds of the examples, four a round, two rounds at most: as many as a quarter of the budget has room for.

    And the steps of each fit, fewer where there is no room for one fold.
    """
    parts = [part for i in range(2) for part in folds(job.examples, 4, job.seed + i)]
    each = job.work.fitting(len(job.examples), len(job.labels), views)
    room = 0.25 * job.budget / each - 1  # one fit is of all rows
    count = next((n for n in (8, 4) if n <= room), 1)
    steps = max(_FEWEST, min(STEPS, int(STEPS * (room + 1) / 2)))
    job.work.charge((count + 1) * each * steps / STEPS)
    job.work.decided |= {"folds": count, "fit_steps": steps}
    return parts[:count], steps
