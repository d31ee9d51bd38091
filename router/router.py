"""The router: a scorer, its statistics of each expert, and a gating; it makes a model answer with the right experts.

>>> router = Router.fit("arrow", Bench(model, {"code": "code", "law": "law"}))
>>> with router.routed(model, batch):                # each token, or each row, with its own experts
...     logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import compose
from compose.expr.tree import Ref, add
from compose.runtime.model_runtime import runtime
from hub.errors import Conflict, NotFound, UsageError, suggest
from router.bench import Batch, Bench, Experts, tree
from router.dispatch import row_expressions
from router.gating import Gating
from router.scorer import Recorder, RowScorer, Scorer, SiteScorer, Statistics, make_scorer
from router.sitewise import SiteGate

NO_TASK = "this is no router that is asked for a task"


@dataclass(frozen=True)
class Router:
    """Which experts answer, and with what weight.

    Attributes
    ----------
    scorer : how well an expert fits a row, or a token at a site.
    experts : name -> name of an adapter resident in the model, or an expression over them.
    statistics : what the scorer knows of each expert (and under `SHARED` of none in particular).
    gating : from scores to sparse weights.
    """

    scorer: Scorer
    experts: Experts
    statistics: Mapping[str, Statistics]
    gating: Gating

    def __post_init__(self) -> None:
        if not self.experts:
            raise UsageError("a router needs at least one expert", hint="give the adapters it chooses from")
        self.scorer.check(self.gating, len(self.experts))

    @classmethod
    def fit(
        cls, method: str, bench: Bench, *, options: Mapping[str, Any] | None = None, gating: Gating | None = None
    ) -> Router:
        """Fit a scorer on a model with its experts attached.

        `gating` defaults to the method's own, with no more experts than there are.

        Raises
        ------
        UsageError
            An unknown method or option, no experts, an expert without text where the method needs some.
        """
        if not bench.experts:
            raise UsageError("a router needs at least one expert", hint="give the adapters it chooses from")
        scorer = make_scorer(method, options)
        gating = (gating or within(scorer.gating, len(bench.experts))).check(len(bench.experts))
        return cls(scorer, dict(bench.experts), scorer.fit(bench), gating)

    @property
    def level(self) -> str:
        """``row`` or ``site``: what is weighed apart."""
        return self.scorer.level

    def check_task(self, task: str | None) -> None:
        """Refuse a row that names no task where the router reads one, or that names a task where it does not."""
        if not self.scorer.reads_tasks:
            if task is not None:
                raise UsageError(f"{NO_TASK}: {self.scorer.name} chooses by itself", hint="leave the task out")
            return
        experts = ", ".join(self.experts)
        if task is None:
            raise UsageError("a row of this router says its task, and this one names none", hint=f"one of {experts}")
        if task not in self.experts:
            near = suggest(task, self.experts)
            raise NotFound(f"the task is {task!r}, which is no member of the router", hint=near or f"one of {experts}")

    def add(self, expert: str, bench: Bench) -> Router:
        """The router with one more expert, measured alone: the others' statistics stay as they are.

        Raises
        ------
        UsageError
            A method that learns its experts against each other, or an expert without text.
        Conflict
            There is an expert of that name.
        """
        if expert in self.experts:
            raise Conflict(
                f"the router has an expert {expert!r} already", hint="take it out first, or rename the new one"
            )
        if self.scorer.joint:
            raise UsageError(
                f"{self.scorer.name} learns its experts together, so none can be added alone",
                hint="fit again with all of them: hub route fit",
            )
        if self.scorer.needs_data:
            replace(bench, experts={expert: bench.experts[expert]}).need_data()
        statistics = self.scorer.measure(expert, bench)
        experts = {**self.experts, expert: bench.experts[expert]}
        return replace(self, experts=experts, statistics={**self.statistics, expert: statistics})

    def without(self, expert: str) -> Router:
        """The router as if it had never had this expert (of a jointly learned one the rest was trained beside it)."""
        if expert not in self.experts:
            raise NotFound(f"the router has no expert {expert!r}", hint=suggest(expert, self.experts))
        experts = {name: what for name, what in self.experts.items() if name != expert}
        known = {name: s for name, s in self.statistics.items() if name != expert}
        return replace(self, experts=experts, statistics=known, gating=within(self.gating, len(experts)))

    def weights(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Weights of the experts for each row (B, E).

        A scorer at sites is asked by one forward pass: the mean over sites of what each real token gets, then over the
        row's tokens.
        """
        if isinstance(self.scorer, RowScorer):
            own = {name: self.statistics[name] for name in self.experts}
            return self.gating(self.scorer.score(model, batch, self.experts, own))
        weights, mask = self.token_weights(model, batch), batch.attention_mask[..., None]
        return (weights * mask).sum(1) / mask.sum(1)

    def token_weights(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Weights of the experts for each token (B, T, E), the mean over sites where a site is what is weighed."""
        if isinstance(self.scorer, RowScorer):
            rows = self.weights(model, batch)
            return rows[:, None].expand(len(rows), batch.input_ids.shape[1], -1)
        total, sites = torch.zeros(()), 0

        def record(_path: str, weights: Tensor) -> None:
            nonlocal total, sites
            total, sites = total.to(weights.device) + weights, sites + 1

        with torch.no_grad(), self.routed(model, batch, record=record):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        if not sites:
            raise UsageError(
                f"{self.scorer.name} has weighed no expert at any site", hint="fit it again: hub route fit"
            )
        return total / sites

    def span_weights(self, model: PreTrainedModel, batch: Batch, span: int) -> Tensor:
        """Weights (B, T, E) of a scorer of rows that is asked anew for each span of `span` tokens, by itself."""
        if span < 1:
            raise UsageError(f"a span of {span} tokens holds nothing", hint="1 or more")
        parts = []
        for start in range(0, batch.input_ids.shape[1], span):
            here = slice(start, start + span)
            part = Batch(batch.input_ids[:, here], batch.attention_mask[:, here], batch.tasks)
            parts.append(self.token_weights(model, part))
        return torch.cat(parts, dim=1)

    def activate_spans(self, model: PreTrainedModel, batch: Batch, span: int) -> None:
        """Make the experts active for reading this batch, each span of its tokens with its own.

        Raises
        ------
        UsageError
            A method that weighs tokens at sites anyway, or an expert that is an expression.
        KindError
            An expert that acts on whole rows: a prompt, a prefix or a head.
        """
        trees = [tree(expert) for expert in self.experts.values()]
        if not isinstance(self.scorer, RowScorer) or not all(isinstance(expert, Ref) for expert in trees):
            raise UsageError(
                f"spans are for methods that weigh rows and for plain adapters, not {self.scorer.name} over "
                + ", ".join(map(str, trees)),
                hint="Router.activate",
            )
        weights = self.span_weights(model, batch, span).float()
        names = [name for expert in trees for name in expert.refs]
        compose.activate(model, add(*trees), weights={name: weights[..., e] for e, name in enumerate(names)})

    def activate(self, model: PreTrainedModel, batch: Batch, *, record: Recorder | None = None) -> None:
        """Make the experts active for a batch, and for what is generated from it.

        Rows are scored now, once; tokens at sites whenever one comes. `record` is told the weights at each site.
        """
        if isinstance(self.scorer, SiteScorer):
            mixer = self.scorer.mixer(self.statistics, record)
            if mixer is None:
                own = {name: self.statistics[name] for name in self.experts}
                mixer = SiteGate(self.scorer.scores(own), self.gating, len(self.experts), record)
            compose.route(model, list(self.experts.values()), mixer)
            return
        compose.activate(model, row_expressions(list(self.experts.values()), self.weights(model, batch)))

    @contextmanager
    def routed(self, model: PreTrainedModel, batch: Batch, *, record: Recorder | None = None) -> Iterator[None]:
        """Like `activate`; afterwards what was active is active again."""
        model_runtime = runtime(model)
        before = model_runtime.rows, model_runtime.weights, model_runtime.routing
        self.activate(model, batch, record=record)
        try:
            yield
        finally:
            model_runtime.activate(*before)


def within(gating: Gating, experts: int) -> Gating:
    """The same gating for a pool that may be smaller than its top k."""
    return gating if gating.top_k is None else replace(gating, top_k=max(1, min(gating.top_k, experts)))
