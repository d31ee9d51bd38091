"""What the quickstart measures: perplexity by domain of every way to use the experts, and a stream that changes domain.

All figures come from the same windows of the same held-out documents; perplexity is exp of the nats per token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router import Ensemble
from router.ensemble.demix import EnsembleScore
from router.ensemble.experts import context_of, expert_log_probs
from train.quickstart.corpus import Domain

CONTEXT = 512  # tokens in one window; a base with fewer positions gets its own
DOCUMENT_TOKENS = 640  # of a held-out document at most: enough for two windows under one posterior
BATCH = 8
SEGMENT = 192  # tokens of a domain in the stream
STREAMS = 6
FORGETTING = 0.95  # gamma on the stream: evidence of 20 tokens
GAMMAS = (0.0, 0.5, 0.8, 0.9, FORGETTING, 0.98, 0.99, 1.0)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class DocumentScores:
    """One held-out document: nats of each way to predict its `tokens`."""

    name: str
    tokens: int
    base: float
    average: float
    uniform: float
    demix: float
    experts: tuple[float, ...]
    regret: float  # the largest NLL(mixture) - NLL(e) - ln(1 / prior) over the experts; the guarantee: not above 0
    final: tuple[float, ...]  # posterior after the last token
    path: Tensor  # (tokens, E) posterior used for each token


@dataclass(frozen=True)
class DomainResult:
    """Perplexities of one domain over its held-out documents."""

    name: str
    documents: tuple[DocumentScores, ...]
    experts: Mapping[str, float] = field(default_factory=dict)
    base: float = math.nan
    average: float = math.nan
    uniform_ensemble: float = math.nan
    demix: float = math.nan

    @property
    def best_expert(self) -> float:
        """Perplexity of the best expert in hindsight."""
        return min(self.experts.values())

    @property
    def best_name(self) -> str:
        """Name of that expert."""
        return min(self.experts, key=self.experts.__getitem__)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(document.tokens for document in self.documents)


@dataclass(frozen=True)
class StreamResult:
    """Perplexities on streams whose domain changes, and the first stream's posterior paths."""

    gamma: float
    tokens: int
    base: float
    average: float
    uniform_ensemble: float
    demix: float
    oracle: float  # each segment read by its own expert
    experts: Mapping[str, float]
    by_gamma: Mapping[float, float]
    domains: tuple[str, ...]  # of the first stream's segments
    borders: tuple[int, ...]  # first prediction of each segment
    paths: Mapping[float, Tensor]  # gamma -> (tokens, E)


class Judge:
    """Scores token sequences under the base, the weight average and the experts of one model.

    Parameters
    ----------
    model
        Has an adapter for each name in `experts`.
    experts
        Names, one per domain, in the order of all reported columns.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, experts: Sequence[str]) -> None:
        self.model, self.tokenizer, self.experts = model, tokenizer, tuple(experts)
        self.context = min(CONTEXT, context_of(model) or CONTEXT)
        self.references = (None, f"average({', '.join(experts)})")

    def ids(self, text: str, most: int) -> list[int]:
        """Tokens of a text behind the token that begins or separates texts, `most` predictions at most."""
        found: list[int] = self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        return ([] if first is None else [first]) + found[:most]

    def score(self, rows: Sequence[Sequence[int]], *, gamma: float = 1.0) -> tuple[EnsembleScore, Tensor]:
        """Ensemble score of a batch with a uniform prior, and log probabilities (2, B, T-1) of base and average."""
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        score = Ensemble(self.model, self.experts, gamma=gamma, context=self.context).score(ids, mask)
        references, _ = expert_log_probs(self.model, self.references, ids, mask, context=self.context)
        return score, references.double()

    def documents(self, texts: Sequence[tuple[str, str]], advance: Advance) -> list[DocumentScores]:
        """Score (name, text) pairs in batches of similar length; the order of the texts is kept."""
        rows = [self.ids(text, DOCUMENT_TOKENS) for _, text in texts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, DocumentScores] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            score, references = self.score([rows[i] for i in batch])
            uniform = score.reweighed(temperature=math.inf).nll
            for b, i in enumerate(batch):
                found[i] = DocumentScores(
                    name=texts[i][0],
                    tokens=int(score.tokens[b]),
                    base=-float(references[0, b].sum()),
                    average=-float(references[1, b].sum()),
                    uniform=float(uniform[b]),
                    demix=float(score.nll[b]),
                    experts=tuple(score.expert_nll[:, b].tolist()),
                    regret=float(score.regret[:, b].max()),
                    final=tuple(score.final[b].tolist()),
                    path=score.posterior[b][score.valid[b]].cpu(),
                )
                advance(1)
        return [found[i] for i in range(len(rows))]


def measure_domains(judge: Judge, domains: Sequence[Domain], advance: Advance) -> list[DomainResult]:
    """Perplexities of each domain's held-out documents."""
    texts = [(document.name, document.text) for domain in domains for document in domain.heldout]
    scored = iter(judge.documents(texts, advance))
    results = []
    for domain in domains:
        documents = tuple(next(scored) for _ in domain.heldout)
        tokens = sum(d.tokens for d in documents)
        columns = zip(*(d.experts for d in documents), strict=True)
        results.append(
            DomainResult(
                domain.name,
                documents,
                experts={e: math.exp(sum(c) / tokens) for e, c in zip(judge.experts, columns, strict=True)},
                base=math.exp(sum(d.base for d in documents) / tokens),
                average=math.exp(sum(d.average for d in documents) / tokens),
                uniform_ensemble=math.exp(sum(d.uniform for d in documents) / tokens),
                demix=math.exp(sum(d.demix for d in documents) / tokens),
            )
        )
    return results


@dataclass(frozen=True)
class Stream:
    """Tokens of several domains one after another."""

    ids: list[int]
    domains: tuple[str, ...]
    borders: tuple[int, ...]  # index of each segment's first prediction


def make_streams(judge: Judge, domains: Sequence[Domain], *, seed: int) -> list[Stream]:
    """Streams that join a piece of one held-out document of each domain, in an order drawn from the seed.

    No document is used twice; there are as many streams as the smallest domain allows, at most six.
    """
    count = min(STREAMS, *(len(domain.heldout) for domain in domains))
    draw = random.Random(f"{seed}/streams")  # noqa: S311  (no secret)
    pieces = {}
    for domain in domains:
        rows = [judge.ids(document.text, SEGMENT)[-SEGMENT:] for document in domain.heldout]
        pieces[domain.name] = sorted(draw.sample(rows, len(rows)), key=len, reverse=True)[:count]
    streams = []
    for turn in range(count):
        order = draw.sample([domain.name for domain in domains], len(domains))
        ids = judge.ids("", 0)
        borders = []
        for name in order:
            borders.append(max(len(ids) - 1, 0))
            ids = ids + pieces[name][turn]
        streams.append(Stream(ids, tuple(order), tuple(borders)))
    return streams


def measure_streams(judge: Judge, streams: Sequence[Stream], advance: Advance) -> StreamResult:
    """Perplexities over all streams, for several discounts from one forward pass each."""
    totals: dict[str, float] = dict.fromkeys(("base", "average", "uniform", "oracle"), 0.0)
    experts = torch.zeros(len(judge.experts), dtype=torch.float64)
    by_gamma = dict.fromkeys(GAMMAS, 0.0)
    paths: dict[float, Tensor] = {}
    tokens = 0
    for number, stream in enumerate(streams):
        score, references = judge.score([stream.ids], gamma=FORGETTING)
        tokens += int(score.tokens.sum())
        totals["base"] -= float(references[0].sum())
        totals["average"] -= float(references[1].sum())
        totals["uniform"] += float(score.reweighed(temperature=math.inf).nll.sum())
        experts += score.expert_nll.sum(1).cpu()
        ends = [*stream.borders[1:], len(stream.ids) - 1]
        for name, start, end in zip(stream.domains, stream.borders, ends, strict=True):
            own = judge.experts.index(name)
            totals["oracle"] -= float(score.expert_log_probs[own, 0, start:end].double().sum())
        for gamma in GAMMAS:
            forgetting = score.reweighed(gamma=gamma)
            by_gamma[gamma] += float(forgetting.nll.sum())
            if number == 0 and gamma in (FORGETTING, 1.0):
                paths[gamma] = forgetting.posterior[0].cpu()
        advance(1)
    by_gamma = {gamma: math.exp(nats / tokens) for gamma, nats in by_gamma.items()}
    return StreamResult(
        gamma=FORGETTING,
        tokens=tokens,
        base=math.exp(totals["base"] / tokens),
        average=math.exp(totals["average"] / tokens),
        uniform_ensemble=math.exp(totals["uniform"] / tokens),
        demix=by_gamma[FORGETTING],
        oracle=math.exp(totals["oracle"] / tokens),
        experts={e: math.exp(v / tokens) for e, v in zip(judge.experts, experts.tolist(), strict=True)},
        by_gamma=by_gamma,
        domains=streams[0].domains,
        borders=streams[0].borders,
        paths=paths,
    )
