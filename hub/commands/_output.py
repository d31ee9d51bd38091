"""What the commands of ``hub`` print: the tools of `hub.console.output`, and the facts of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hub.console.output import bytes_text, columns, fitted, json_option, print_json, say, warn

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact
    from hub.store import Store

__all__ = ["bytes_text", "columns", "documents", "json_option", "print_json", "say", "summary", "table", "warn"]


def summary(artifact: Artifact) -> dict[str, Any]:
    """Facts of an artifact as JSON, from the index alone."""
    facts = artifact.facts
    return {
        "ref": str(artifact.ref),
        "name": facts.name,
        "version": facts.version,
        "digest": facts.digest,
        "type": facts.type,
        "kind": facts.kind,
        "method": facts.method,
        "task": facts.task,
        "base": facts.base,
        "license": facts.license,
        "summary": facts.summary,
        "size": facts.size,
        "created": facts.created,
        "aliases": list(facts.aliases),
        "yanked": facts.yanked,
    }


def documents(store: Store, artifacts: Sequence[Artifact], metric: str | None) -> list[dict[str, Any]]:
    """Facts of several artifacts as JSON, with their figures of one metric."""
    scores = {} if metric is None else store.scores(artifacts, metric)
    documents = []
    for artifact in artifacts:
        figures = [
            {"metric": score.metric, "value": score.value, "dataset": score.dataset, "split": score.split}
            for score in scores.get(artifact.digest, ())
        ]
        documents.append(summary(artifact) | ({} if metric is None else {"scores": figures}))
    return documents


def table(store: Store, artifacts: Sequence[Artifact], metric: str | None, ascending: bool | None = None) -> str:
    """Artifacts as a table, with their best figure of one metric."""
    from hub.storage.query import low_is_good

    scores = {} if metric is None else store.scores(artifacts, metric)
    best = min if metric is not None and low_is_good(metric, ascending) else max
    header = ["NAME", "VERSION", "KIND", "TASK", "BASE", "SIZE", *([metric.upper()] if metric else []), "ALIASES"]
    rows = []
    for artifact in artifacts:
        facts = artifact.facts
        marks = [f"@{alias}" for alias in facts.aliases] + (["yanked"] if facts.yanked is not None else [])
        row = [facts.name, facts.version, facts.kind or facts.type, facts.task or "", facts.base or ""]
        row.append(bytes_text(facts.size))
        if metric is not None:
            values = [score.value for score in scores.get(artifact.digest, ())]
            row.append(f"{best(values):.4g}" if values else "")
        rows.append([*row, " ".join(marks)])
    return fitted(header, rows, cut=("BASE", "TASK", "ALIASES"))
