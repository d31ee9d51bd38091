"""``hub show``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from hub.commands._output import bytes_text, columns, json_option, print_json, summary

if TYPE_CHECKING:
    from hub.manifest import Manifest, Metric
    from hub.storage.artifact import Artifact


@click.command()
@click.argument("ref")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def show(ref: str, tensors: bool, as_json: bool) -> None:
    """Show one artifact: facts, metrics, files, lineage.

    With --json: the facts of `hub list` and the whole manifest.
    """
    from hub.store import Store

    artifact = Store().get(ref)
    if as_json:
        print_json({**summary(artifact), "manifest": artifact.manifest.model_dump(mode="json")})
        return
    for line in _lines(artifact):
        click.echo(line)
    if tensors:
        rows = [(t.name, t.dtype, "x".join(map(str, t.shape)), t.sha256[:16]) for t in artifact.manifest.tensors]
        click.echo("\n" + columns(("TENSOR", "DTYPE", "SHAPE", "SHA256"), rows))


def _lines(artifact: Artifact) -> Iterator[str]:
    manifest = artifact.manifest
    yield str(artifact.ref)
    if manifest.summary:
        yield manifest.summary
    yield ""
    for name, value in _facts(artifact, manifest):
        if value:
            yield f"{name + ':':<12} {value}"
    if manifest.hyperparameters:
        yield f"{'config:':<12} " + ", ".join(f"{key}={value}" for key, value in manifest.hyperparameters.items())
    for warning in manifest.warnings:
        yield f"{'warning:':<12} {warning}"
    if manifest.metrics:
        yield ""
        yield columns(("DATASET", "SPLIT", "METRIC", "VALUE", "N", "SEEDS"), map(_metric, manifest.metrics))
    yield ""
    rows = [(f.path, f.role, bytes_text(f.size), f.sha256[:16]) for f in manifest.files]
    yield columns(("FILE", "ROLE", "SIZE", "SHA256"), rows)


def _facts(artifact: Artifact, manifest: Manifest) -> Iterator[tuple[str, str | None]]:
    facts, base, lineage = artifact.facts, manifest.base, manifest.lineage
    yield "digest", artifact.digest
    yield "aliases", ", ".join(facts.aliases)
    yield "yanked", facts.yanked
    yield "type", manifest.type
    yield "kind", manifest.kind
    yield "method", manifest.method
    yield "expression", manifest.expression
    yield "task", manifest.task
    yield "labels", ", ".join(manifest.labels)
    yield "reader", manifest.reader
    yield "languages", ", ".join(manifest.languages)
    yield "domains", ", ".join(manifest.domains)
    if base is not None:
        yield "base", base.repo + (f"@{base.revision}" if base.revision else "")
        yield "weights", base.weights_fingerprint
    if manifest.trained_on is not None:
        yield "trained on", ", ".join(f"{k}={v}" for k, v in manifest.trained_on.as_dict().items() if k != "libraries")
    yield "tensors", f"{len(manifest.tensors)} ({manifest.tensors_digest})" if manifest.tensors else None
    yield "requires", ", ".join(need.name + (need.range or "") for need in manifest.requires)
    if lineage is not None:
        yield "parents", ", ".join(lineage.parents)
        yield "run", lineage.run
    yield "license", manifest.license
    yield "size", bytes_text(manifest.size)
    yield "created", facts.created


def _metric(metric: Metric) -> tuple[str, ...]:
    value = f"{metric.value:.4g}" + (f" ± {metric.sd:.2g}" if metric.sd is not None else "")
    seeds = ", ".join(map(str, metric.seeds))
    return metric.dataset, metric.split, metric.metric, value, "" if metric.n is None else str(metric.n), seeds
