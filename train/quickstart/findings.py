"""The run's figures as plain data, and what they show: each claim with whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from train.quickstart.story import Story, peak_rss_mb

BEST_WITHIN = 1.03
REGRET_TOLERANCE = 1e-6  # nats: rounding of float64 sums


@dataclass(frozen=True)
class Claim:
    """One sentence and whether this run bears it out."""

    text: str
    holds: bool


def means(story: Story) -> dict[str, Any]:
    """Means over domains of every perplexity."""
    results = story.results
    names = [expert.domain for expert in story.experts]
    return {
        "base": fmean(r.base for r in results),
        "experts": {name: fmean(r.experts[name] for r in results) for name in names},
        "average": fmean(r.average for r in results),
        "uniform_ensemble": fmean(r.uniform_ensemble for r in results),
        "demix": fmean(r.demix for r in results),
        "best_expert": fmean(r.best_expert for r in results),
    }


@dataclass(frozen=True)
class Row:
    """Perplexities of one way to predict: by domain, and their mean last; `lowest` marks the best of each column."""

    label: str
    values: tuple[float, ...]
    lowest: tuple[bool, ...]


def table(story: Story) -> list[Row]:
    """The comparison: base, each expert, average, uniform ensemble, DEMix, by domain and in the mean."""
    results, mean = story.results, means(story)
    rows = [("base", [*(r.base for r in results), mean["base"]])]
    rows += [(f"expert {e}", [*(r.experts[e] for r in results), value]) for e, value in mean["experts"].items()]
    rows += [
        (label, [*(getattr(r, name) for r in results), mean[name]])
        for label, name in (
            ("average of weights", "average"),
            ("uniform ensemble", "uniform_ensemble"),
            ("DEMix posterior", "demix"),
        )
    ]
    lowest = [min(column) for column in zip(*(values for _, values in rows), strict=True)]
    return [
        Row(label, tuple(values), tuple(v == low for v, low in zip(values, lowest, strict=True)))
        for label, values in rows
    ]


def hindsight(story: Story) -> list[float]:
    """Perplexity of each domain's best expert, and their mean."""
    return [*(result.best_expert for result in story.results), means(story)["best_expert"]]


def worst_regret(story: Story) -> float:
    """Largest NLL(mixture) - NLL(e) - ln(1 / prior) over all held-out documents and experts, in nats."""
    return max(document.regret for result in story.results for document in result.documents)


def claims(story: Story) -> list[Claim]:
    """What the quickstart is there to show, checked on this run."""
    mean, stream = means(story), story.stream
    demix = mean["demix"]
    documents = [document for result in story.results for document in result.documents]
    within = sum(document.regret <= REGRET_TOLERANCE for document in documents)
    distance = demix / mean["best_expert"] - 1
    return [
        Claim("in the mean over domains, the DEMix posterior is better than the base", demix < mean["base"]),
        Claim("... than the average of the experts' weights", demix < mean["average"]),
        Claim("... than the uniform ensemble", demix < mean["uniform_ensemble"]),
        Claim("... than every single expert", demix < min(mean["experts"].values())),
        Claim(
            f"it is within 3% of the best expert in hindsight ({distance:+.1%})",
            demix <= BEST_WITHIN * mean["best_expert"],
        ),
        Claim(
            "on streams whose domain changes it is better than every expert",
            stream.demix < min(stream.experts.values()),
        ),
        Claim(
            f"the regret bound NLL(mixture) ≤ NLL(expert) + ln(1/prior) holds for {within} of {len(documents)} "
            "held-out documents and every expert",
            within == len(documents),
        ),
    ]


def as_dict(story: Story) -> dict[str, Any]:
    """The JSON of a run."""
    options, stream = story.options, story.stream
    trained = {expert.domain: expert for expert in story.experts}
    return {
        "domains": {
            result.name: {
                **_perplexities(result),
                "best_expert": result.best_expert,
                "best_expert_name": result.best_name,
                "tokens": result.tokens,
                "heldout_documents": len(domain.heldout),
                "train_documents": len(domain.train),
                "left_out": list(domain.left_out),
                "data_digest": domain.digest,
            }
            for result, domain in zip(story.results, story.domains, strict=True)
        },
        "mean": means(story),
        "stream": {
            **_perplexities(stream),
            "own_experts": stream.oracle,
            "best_expert": min(stream.experts.values()),
            "gamma": stream.gamma,
            "by_gamma": {str(gamma): value for gamma, value in stream.by_gamma.items()},
            "tokens": stream.tokens,
        },
        "regret": {"worst_nats": worst_regret(story), "documents": sum(len(r.documents) for r in story.results)},
        "claims": [{"text": claim.text, "holds": claim.holds} for claim in claims(story)],
        "experts": {
            name: {
                "ref": str(expert.artifact.ref),
                "digest": expert.artifact.digest,
                "trained": expert.trained,
                "seconds": round(expert.seconds, 1),
            }
            for name, expert in trained.items()
        },
        "base": options.base,
        "parameters": story.parameters,
        "quantize": options.quantize,
        "kind": options.kind,
        "steps": options.steps,
        "seed": options.seed,
        "stores": list(story.stores),
        "machine": dict(story.machine),
        "seconds": story.seconds,
        "peak_rss_mb": peak_rss_mb(),
    }


def _perplexities(result: Any) -> dict[str, Any]:
    experts: Mapping[str, float] = result.experts
    return {
        "base": result.base,
        "experts": dict(experts),
        "average": result.average,
        "uniform_ensemble": result.uniform_ensemble,
        "demix": result.demix,
    }
