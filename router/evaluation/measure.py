"""How well a router does: perplexity or accuracy on named sets of rows, beside what it has to beat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.expr.tree import Add, Expr, Scale
from hub.console.progress import Steps
from hub.errors import UsageError
from router.bench import Batch, Experts, tree
from router.ensemble.demix import mix
from router.ensemble.experts import active, expert_log_probs
from router.ensemble.posterior import fitted, log_prior
from router.router import Router

WAYS = {
    "perplexity": ("base", "best single", "average", "uniform", "routed", "oracle"),
    "accuracy": ("base", "best single", "average", "routed", "oracle"),
}


@dataclass(frozen=True)
class Report:
    """Figures of each set of rows.

    Attributes
    ----------
    metric : ``perplexity`` (lower is better) or ``accuracy``.
    rows : for each set: its name, the figure of each of its `ways`, how many items, which expert the oracle took.
    best_single : the one expert that does best over all sets.
    confusion : set -> mean weight of each expert on its rows.
    single : set -> figure of each expert alone.
    """

    metric: str
    rows: tuple[dict[str, Any], ...]
    best_single: str
    confusion: Mapping[str, Mapping[str, float]]
    single: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def ways(self) -> tuple[str, ...]:
        """What is compared, in order."""
        return WAYS[self.metric]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "metric": self.metric,
            "best_single": self.best_single,
            "rows": list(self.rows),
            "confusion": {name: dict(figures) for name, figures in self.confusion.items()},
            "single": {name: dict(figures) for name, figures in self.single.items()},
        }


def perplexities(
    router: Router,
    model: PreTrainedModel,
    sets: Mapping[str, Sequence[Tensor]],
    *,
    dev: Mapping[str, Sequence[Tensor]] | None = None,
    pad: int = 0,
    progress: Steps | None = None,
) -> Report:
    """Perplexity of each set of encoded rows under base, best single, average, uniform, router and oracle.

    The oracle of a set is the expert of its name; where none has it, the one that does best on it. `average` weighs the
    experts' effects alike, `uniform` their output probabilities. A ``likelihood`` router mixes probabilities by the
    running posterior (DEMix), from a prior fitted on the rows that `dev` has for the set; the others weigh the experts
    inside the model.
    """
    names = list(router.experts)
    measured: dict[str, _Losses] = {}
    for name, rows in sets.items():
        prior = _prior(router, model, (dev or {}).get(name, ()), pad)
        measured[name] = _losses(router, model, name, rows, prior, pad)
        if progress is not None:
            progress("measure", len(measured), len(sets))
    best = names[int(torch.stack([losses.alone[2:] for losses in measured.values()]).mean(0).argmin())]
    table, single = [], {}
    for name, losses in measured.items():
        base, mean, *own = losses.alone.exp().tolist()
        single[name] = alone = dict(zip(names, own, strict=True))
        oracle = name if name in alone else min(alone, key=alone.__getitem__)
        figures = (base, alone[best], mean, math.exp(losses.uniform), math.exp(losses.routed), alone[oracle])
        values = dict(zip(WAYS["perplexity"], figures, strict=True))
        table.append({"set": name, **values, "expert": oracle, "items": losses.tokens})
    confusion = {name: dict(zip(names, losses.weights.tolist(), strict=True)) for name, losses in measured.items()}
    return Report("perplexity", tuple(table), best, confusion, single)


@dataclass(frozen=True)
class _Losses:
    """Nats a token on one set: base, average and each expert (2 + E,), uniform, routed; the experts' mean weights."""

    alone: Tensor
    uniform: float
    routed: float
    tokens: int
    weights: Tensor


def _prior(router: Router, model: PreTrainedModel, rows: Sequence[Tensor], pad: int) -> Tensor:
    """Log prior (E,): uniform, or the fixed weights that explain some rows best."""
    if not rows:
        return log_prior(None, len(router.experts))
    read = [
        expert_log_probs(model, [*map(tree, router.experts.values())], batch.input_ids, batch.attention_mask)
        for batch in _batches(rows, pad, model)
    ]
    return fitted(torch.cat([log_probs[:, valid].T for log_probs, valid in read])).cpu()


def _losses(
    router: Router, model: PreTrainedModel, name: str, rows: Sequence[Tensor], prior: Tensor, pad: int
) -> _Losses:
    members: list[Expr | None] = [None, average(router.experts), *map(tree, router.experts.values())]
    total = torch.zeros(len(members), dtype=torch.float64)
    weights = torch.zeros(len(router.experts), dtype=torch.float64)
    own, alike, tokens = 0.0, 0.0, 0
    for batch in _batches(rows, pad, model):
        asked = Batch(batch.input_ids, batch.attention_mask, (name,) * len(batch) if name in router.experts else ())
        # One pass for base, average and every expert; all mixtures of probabilities follow from it.
        log_probs, valid = expert_log_probs(model, members, batch.input_ids, batch.attention_mask)
        total -= log_probs.double().sum((1, 2)).cpu()
        tokens += int(valid.sum())
        even = mix(log_probs[2:], valid, log_prior=log_prior(None, len(weights)), temperature=math.inf)
        alike += float(even.nll.sum())
        if router.scorer.name == "likelihood":
            score = even.reweighed(prior=prior.exp(), **_pace(router))
            own += float(score.nll.sum())
            weights += score.final.sum(0).cpu()
        else:  # weighs inside the model, so it needs a pass of its own
            own += _routed_nll(router, model, asked, valid)
            weights += router.weights(model, asked).double().sum(0).cpu()
    if not tokens:
        raise UsageError(f"the texts of {name!r} have no token to predict", hint="give longer texts")
    return _Losses(total / tokens, alike / tokens, own / tokens, tokens, weights / len(rows))


def _pace(router: Router) -> dict[str, Any]:
    """How the weights of a ``likelihood`` router move."""
    options = router.scorer.options
    prefix = None if options.tokens is None else options.tokens - 1
    how = {"gamma": options.gamma, "hedge": options.hedge, "prefix": prefix}
    return {"temperature": router.gating.temperature, **how}


def _routed_nll(router: Router, model: PreTrainedModel, batch: Batch, valid: Tensor) -> float:
    with torch.no_grad(), router.routed(model, batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return -float(log_probs.masked_fill(~valid, 0.0).double().sum())


def average(experts: Experts) -> Expr:
    """All experts at equal weight, 1 / E each."""
    trees = [tree(expert) for expert in experts.values()]
    return Add([Scale(1 / len(trees), expert) for expert in trees]) if len(trees) > 1 else trees[0]


@dataclass(frozen=True)
class LabelledRows:
    """Encoded rows with the name of the class of each."""

    rows: Sequence[Tensor]
    labels: Sequence[str]


def accuracies(
    router: Router,
    model: PreTrainedModel,
    sets: Mapping[str, LabelledRows],
    classes: Mapping[str, Sequence[str]],
    *,
    pad: int = 0,
    progress: Steps | None = None,
) -> Report:
    """Accuracy on each set under base head, best single, average, router and oracle.

    Each row is answered by the expert that weighs most for it, with that expert's own head and classes; `average` is
    the vote of all experts' probabilities. A row counts when the name of its class is said.
    """
    names = list(router.experts)
    right: dict[str, dict[str, float]] = {}
    confusion: dict[str, dict[str, float]] = {}
    for done, (name, labelled) in enumerate(sets.items(), 1):
        said: dict[str, list[dict[str, float]]] = {expert: [] for expert in names}
        chosen: list[int] = []
        weights = torch.zeros(len(names), dtype=torch.float64)
        for batch in _batches(labelled.rows, pad, model):
            asked = Batch(batch.input_ids, batch.attention_mask, (name,) * len(batch) if name in names else ())
            w = router.weights(model, asked).double().cpu()
            weights += w.sum(0)
            chosen += w.argmax(1).tolist()
            for expert in names:
                said[expert] += _answers(model, router.experts[expert], asked, classes[expert])
        confusion[name] = dict(zip(names, (weights / len(labelled.rows)).tolist(), strict=True))
        right[name] = _right(labelled.labels, said, [names[i] for i in chosen])
        if progress is not None:
            progress("measure", done, len(sets))
    best = max(names, key=lambda expert: sum(figures[expert] for figures in right.values()))
    table = []
    for name, figures in right.items():
        oracle = name if name in names else max(names, key=lambda expert: figures[expert])
        values = (math.nan, figures[best], figures["average"], figures["routed"], figures[oracle])
        ways = dict(zip(WAYS["accuracy"], values, strict=True))
        table.append({"set": name, **ways, "expert": oracle, "items": len(sets[name].rows)})
    return Report("accuracy", tuple(table), best, confusion, {n: {e: f[e] for e in names} for n, f in right.items()})


def _right(
    labels: Sequence[str], said: Mapping[str, Sequence[Mapping[str, float]]], chosen: Sequence[str]
) -> dict[str, float]:
    def top(answer: Mapping[str, float]) -> str:
        return max(answer, key=answer.__getitem__)

    def vote(i: int) -> str:
        total: dict[str, float] = {}
        for answers in said.values():
            for label, p in answers[i].items():
                total[label] = total.get(label, 0.0) + p
        return top(total)

    n = len(labels)
    alone = {e: sum(top(answers[i]) == labels[i] for i in range(n)) / n for e, answers in said.items()}
    routed = sum(top(said[chosen[i]][i]) == labels[i] for i in range(n)) / n
    return {**alone, "routed": routed, "average": sum(vote(i) == labels[i] for i in range(n)) / n}


@torch.no_grad()
def _answers(
    model: PreTrainedModel, expert: Expr | str, batch: Batch, classes: Sequence[str]
) -> list[dict[str, float]]:
    with active(model, [expert]):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if logits.shape[-1] != len(classes):
        raise UsageError(f"{expert} answers {logits.shape[-1]} classes, and its manifest names {len(classes)}")
    return [dict(zip(classes, row, strict=True)) for row in logits.float().softmax(-1).tolist()]


def _batches(rows: Sequence[Tensor], pad: int, model: PreTrainedModel, size: int = 16) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield Batch.of(rows[start : start + size], pad=pad).to(model.device)
