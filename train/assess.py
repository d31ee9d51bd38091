"""How well an adapter, or an expression over adapters, does on a file of rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import compose
from compose.base.at_hand import at_hand
from compose.base.text_config import fill_pad_id
from compose.expr.tree import Ref
from compose.planning.held import held_as, manifests_of
from compose.planning.members import AdapterFinder
from compose.reader import open_reader, refuse_readers
from hub.errors import UsageError
from hub.manifest import Manifest
from hub.store import Artifact, Store
from train.config import make_config
from train.data.datasets import encode, read_rows
from train.data.files import file_digests
from train.steps import evaluate as measuring
from train.steps.guards import heads_come_later, refuse_looking_ahead, refuse_misfit
from train.steps.read_texts import labelled_texts, measure_scores

__all__ = ["evaluate"]

log = logging.getLogger(__name__)


def evaluate(
    expression: str | None,
    data: str,
    *,
    base: str | None = None,
    task: str | None = None,
    quantize: str | None = None,
    precision: str = "fp32",
    max_length: int = 256,
    batch_size: int = 32,
    columns: Mapping[str, str] | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Load the base with the expression active and measure it on the rows of `data`.

    Base, task, labels and quantization are those of the adapters' manifests unless given.

    Raises
    ------
    UsageError
        The adapters do not say (or do not agree on) the base or the task, and none was given.
    HubError
        What the expression, the base or the data are refused for.
    """
    manifests = [] if expression is None else manifests_of(compose.parse(expression).refs, AdapterFinder(store))
    if expression is not None and any(m.reader for m in manifests):
        return _by_reader(
            expression, data, manifests, base=base, task=task, quantize=quantize, columns=columns, store=store
        )
    base = base or _agreed("base", {at_hand(m.base) for m in manifests if m.base is not None})
    task = task or _agreed("task", {m.task for m in manifests if m.task})
    quantize = held_as(quantize, manifests)
    labels = next((m.labels for m in manifests if m.labels), ())
    options: dict[str, Any] = {"quantize": quantize, "precision": precision, "max_length": max_length}
    config = make_config({"base": base, "task": task, "columns": dict(columns or {}), **options})
    tokenizer = compose.tokenizer(base)
    rows = encode(read_rows(data, part="test"), config, tokenizer, labels=labels, source=data)
    with heads_come_later(any(m.task == task for m in manifests)):
        model = compose.load(
            base,
            expression,
            quantize=quantize,
            dtype=precision,
            task=task,
            labels=(labels or rows.labels) or None,
            store=store,
        )
    resident = compose.runtime.model_runtime.runtime(model).adapters.values()
    refuse_misfit(model, tokenizer, rows, resident, hint="--max-length {}")
    if task == "causal_lm":
        refuse_looking_ahead(model)
    fill_pad_id(model.config, rows.pad_id)
    known = _trained_on(manifests, data)
    started = time.perf_counter()
    measures = measuring.evaluate(model, rows, batch_size=batch_size, precision=precision)
    seconds = round(time.perf_counter() - started, 3)
    facts = {"expression": expression, "base": base, "task": task, "data": data, "data_digest": rows.digest}
    return {**facts, "rows": len(rows), "trained_on": known, "seconds": seconds, "measures": measures}


def _by_reader(
    ref: str,
    data: str,
    manifests: Sequence[Manifest],
    *,
    base: str | None,
    task: str | None,
    quantize: str | None,
    columns: Mapping[str, str] | None,
    store: Store | None,
) -> dict[str, Any]:
    """Measure an artifact that answers through its reader: what the reader says of the texts, nothing else."""
    tree = compose.parse(ref)
    if not isinstance(tree, Ref):
        refuse_readers(manifests, "an expression mixes adapters")
    stored = AdapterFinder(store).find(tree.refs[0])
    if not isinstance(stored.where, Artifact):
        raise UsageError(f"{ref} is a directory, and a reader is that of an artifact", hint=f"hub push {ref}")
    artifact, made_for = stored.where, stored.where.manifest.base
    if quantize not in (None, "none"):
        told = f"{artifact.ref} reads the base as it was saved, by its reader {artifact.manifest.reader}"
        raise UsageError(told, ref=artifact.ref, hint="leave --quantize out")
    where = base or (None if made_for is None else at_hand(made_for))
    reader = open_reader(artifact, where)
    if task not in (None, reader.task):
        raise UsageError(f"{artifact.ref} is for {reader.task}, not for {task}", hint="leave --task out")
    texts, answers, digest = labelled_texts(
        reader, data, columns or {}, named=reader.columns, separator=reader.separator
    )
    known = _trained_on([artifact.manifest], data)
    started = time.perf_counter()
    measures = {**measure_scores(reader, reader.scores(texts), answers), "rows": float(len(texts))}
    seconds = round(time.perf_counter() - started, 3)
    facts = {"expression": ref, "base": where, "task": reader.task, "data": data, "data_digest": digest}
    return {**facts, "rows": len(texts), "trained_on": known, "seconds": seconds, "measures": measures}


def _trained_on(manifests: Sequence[Manifest], data: str) -> list[str]:
    """Files of the data that the adapters have learned from, with a warning where there are some."""
    learned = {digest for m in manifests if m.lineage for name, digest in m.lineage.data.items() if name[:5] != "eval/"}
    known = [name for name, digest in file_digests(data, part="test").items() if digest in learned]
    if known:
        log.warning("%s: the adapters were trained on %s", data, ", ".join(known))
    return known


def _agreed(what: str, values: set[str]) -> str:
    if len(values) == 1:
        return values.pop()
    told = f"the adapters name {', '.join(sorted(values))}" if values else f"nothing names the {what}"
    raise UsageError(told, hint=f"give --{what}")
