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
from router.dispatch import row_expressions
from router.ensemble.demix import mix
from router.ensemble.experts import active, expert_log_probs, read_log_probs
from router.ensemble.posterior import fitted, log_prior
from router.router import Router
from router.scorer import RowScorer

PROMPT = 32  # tokens of a text that its experts are chosen by
WAYS = ("base", "best single", "average", "uniform", "routed", "oracle")
WAYS_OF_LABELS = ("base", "best single", "average", "routed", "oracle")


@dataclass(frozen=True)
class Report:
    """Figures of each set of rows.

    Attributes
    ----------
    metric : ``perplexity`` (lower is better) or ``accuracy``.
    ways : what is compared, in order.
    measured : in a sentence, what the figures are of.
    rows : for each set (and each length of the prompt): its name, the figure of each of its `ways`, how many items,
        which expert the oracle took.
    best_single : the one expert that does best over all sets.
    confusion : set -> mean weight of each expert on its rows; the longest prompt's where there are several.
    single : set -> figure of each expert alone; likewise.
    """

    metric: str
    ways: tuple[str, ...]
    measured: str
    rows: tuple[dict[str, Any], ...]
    best_single: str
    confusion: Mapping[str, Mapping[str, float]]
    single: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "metric": self.metric,
            "measured": self.measured,
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
    prompts: Sequence[int] = (PROMPT,),
    dev: Mapping[str, Sequence[Tensor]] | None = None,
    pad: int = 0,
    progress: Steps | None = None,
) -> Report:
    """Perplexity of what follows a prompt, under base, best single, average, uniform, router and oracle.

    ``routed`` is what the engine answers with: a scorer of rows weighs the experts by the prompt alone and keeps to
    that, a scorer of tokens weighs them at each token. A prompt is the first tokens of a text, as many as `prompts`
    says, or the first half of a text that is no longer. `average` weighs the experts' effects alike, `uniform` their
    output probabilities. The oracle of a set is the expert of its name; where none has it, the one that does best on
    it. For a ``likelihood`` router `demix` mixes the probabilities by the posterior, which moves on with each token, as
    ``ensemble.demix(...)`` answers; it starts from a prior fitted on the rows that `dev` has for the set.
    """
    names, mixes = list(router.experts), router.scorer.name == "likelihood"
    measured: dict[tuple[str, int], _Losses] = {}
    for done, (name, rows) in enumerate(sets.items(), 1):
        prior = _prior(router, model, (dev or {}).get(name, ()), pad)
        measured |= {(name, n): losses for n, losses in _losses(router, model, name, rows, prior, pad, prompts).items()}
        if progress is not None:
            progress("measure", done, len(sets))
    ways = (*WAYS[:4], *(("demix",) if mixes else ()), *WAYS[4:])
    best = names[int(torch.stack([losses.alone[2:] for losses in measured.values()]).mean(0).argmin())]
    table, single = [], {}
    for (name, prompt), losses in measured.items():
        base, mean, *own = losses.alone.exp().tolist()
        single[name] = alone = dict(zip(names, own, strict=True))
        oracle = name if name in alone else min(alone, key=alone.__getitem__)
        figures = {"base": base, "best single": alone[best], "average": mean, "oracle": alone[oracle]}
        figures |= {way: math.exp(loss) for way, loss in losses.mixed.items()}
        row = {way: figures[way] for way in ways}
        table.append({"set": name, "prompt_tokens": prompt, **row, "expert": oracle, "items": losses.tokens})
    confusion = {name: dict(zip(names, losses.weights.tolist(), strict=True)) for (name, _), losses in measured.items()}
    told = "perplexity of what follows a prompt, or the first half of a text that is no longer; routed: as served, "
    told += "weighed at each token" if router.level == "site" else "weighed by the prompt"
    return Report("perplexity", ways, told, tuple(table), best, confusion, single)


@dataclass
class _Losses:
    """Nats on one set behind prompts of one length: of base, average and each expert (2 + E,), and of mixtures."""

    alone: Tensor
    mixed: dict[str, float]
    weights: Tensor  # of the experts (E,), summed over the rows, and in the end their mean
    tokens: int = 0

    def add(self, way: str, log_probs: Tensor, counted: Tensor) -> None:
        """Take up log probabilities (B, T-1) where they count."""
        self.mixed[way] = self.mixed.get(way, 0.0) - float(log_probs.double()[counted].sum())

    def mean(self, rows: int) -> _Losses:
        """A token, and a row."""
        mixed = {way: loss / self.tokens for way, loss in self.mixed.items()}
        return _Losses(self.alone / self.tokens, mixed, self.weights / rows, self.tokens)


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
    router: Router,
    model: PreTrainedModel,
    name: str,
    rows: Sequence[Tensor],
    prior: Tensor,
    pad: int,
    prompts: Sequence[int],
) -> dict[int, _Losses]:
    """Losses of a set behind prompts of each length."""
    members: list[Expr | None] = [None, average(router.experts), *map(tree, router.experts.values())]
    count = len(router.experts)
    total = {n: _Losses(torch.zeros(2 + count).double(), {}, torch.zeros(count).double()) for n in prompts}
    for batch in _batches(rows, pad, model):
        # One pass for base, average and every expert; all mixtures of probabilities follow from it.
        log_probs, valid = expert_log_probs(model, members, batch.input_ids, batch.attention_mask)
        mixed = {"uniform": mix(log_probs[2:], valid, log_prior=log_prior(None, count), temperature=math.inf)}
        if router.scorer.name == "likelihood":
            mixed["demix"] = mixed["uniform"].reweighed(prior=prior.exp(), **_pace(router))
        at_tokens: Tensor | None = None  # of a router that weighs tokens: the same behind any prompt
        for n, losses in total.items():
            prompt = _prompt(batch, n, (name,) if name in router.experts else (), pad)
            begins = prompt.attention_mask.sum(1, keepdim=True)
            counted = valid & (torch.arange(1, valid.shape[1] + 1, device=valid.device) >= begins)
            weights = router.weights(model, prompt)
            if isinstance(router.scorer, RowScorer):
                served = _rows_log_probs(model, row_expressions(list(router.experts.values()), weights), batch)
            else:
                served = at_tokens = _token_log_probs(router, model, batch) if at_tokens is None else at_tokens
            losses.alone -= (log_probs.double() * counted).sum((1, 2)).cpu()
            losses.weights += weights.double().sum(0).cpu()
            losses.tokens += int(counted.sum())
            losses.add("routed", served, counted)
            for way, score in mixed.items():
                losses.add(way, score.log_probs, counted)
    if not all(losses.tokens for losses in total.values()):
        raise UsageError(f"the texts of {name!r} have no token to predict", hint="give longer texts")
    return {n: losses.mean(len(rows)) for n, losses in total.items()}


def _prompt(batch: Batch, tokens: int, task: tuple[str, ...], pad: int) -> Batch:
    """The first tokens of each row, or the first half of a row that has no more."""
    lengths = batch.attention_mask.sum(1).tolist()
    cut = [tokens if length > tokens else max(1, length // 2) for length in lengths]
    rows = [ids[:n].cpu() for ids, n in zip(batch.input_ids, cut, strict=True)]
    return Batch.of(rows, pad=pad, tasks=task * len(rows)).to(batch.input_ids.device)


def _pace(router: Router) -> dict[str, Any]:
    """How the weights of a ``likelihood`` router's mixture move."""
    options = router.scorer.options
    prefix = None if options.tokens is None else options.tokens - 1
    how = {"gamma": options.gamma, "hedge": options.hedge, "prefix": prefix}
    return {"temperature": router.gating.temperature, **how}


def _rows_log_probs(model: PreTrainedModel, expressions: Sequence[Expr | None], batch: Batch) -> Tensor:
    """Log probability of each token (B, T-1), each row under its own expression; those of one are read together."""
    found = torch.zeros(len(batch), batch.input_ids.shape[1] - 1, device=batch.input_ids.device)
    for expression in dict.fromkeys(expressions):
        own = [i for i, other in enumerate(expressions) if other == expression]
        found[own] = expert_log_probs(model, [expression], batch.input_ids[own], batch.attention_mask[own])[0][0]
    return found


def _token_log_probs(router: Router, model: PreTrainedModel, batch: Batch) -> Tensor:
    """The same under a router that weighs its experts at each token."""
    with router.routed(model, batch):
        return read_log_probs(model, 1, batch.input_ids, batch.attention_mask)[0][0]


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
        ways = dict(zip(WAYS_OF_LABELS, values, strict=True))
        table.append({"set": name, **ways, "expert": oracle, "items": len(sets[name].rows)})
    single = {n: {e: f[e] for e in names} for n, f in right.items()}
    told = "accuracy; routed: as it is served, each row answered by the expert that weighs most for all of it"
    return Report("accuracy", WAYS_OF_LABELS, told, tuple(table), best, confusion, single)


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
