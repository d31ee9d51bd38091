"""A trained adapter becomes an artifact: its files, a card, and where all of it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compose
from compose.algebra import parse
from compose.artifacts import probes
from compose.artifacts.publish import publish_composition
from compose.base.quantization import quantization_of
from compose.expr.tree import Ref, substitute
from compose.planning.members import AdapterFinder
from hub.manifest import Draft, Lineage, Metric, TrainedOn
from hub.pack import pack
from hub.ref import AdapterRef
from hub.relations.word_counts import SELF, write_words
from hub.store import Artifact, Store
from train.config import TrainConfig
from train.data.batches import Dataset
from train.method import Composite
from train.result import FitResult
from train.results.card import write_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compose.kind.adapter import Adapter
    from hub.relations.word_counts import Counts

__all__ = ["next_version", "publish", "publish_learned", "write_artifact"]

_LIBRARIES = ("moduloom", "torch", "transformers", "accelerate", "safetensors", "bitsandbytes")
_NF4_BLOCK = 64  # values that share one absmax in bitsandbytes' nf4


def publish(
    directory: Path,
    adapter: Adapter,
    model: PreTrainedModel,
    config: TrainConfig,
    result: FitResult,
    *,
    store: Store | None = None,
    **facts: Any,
) -> Artifact:
    """Write a trained adapter as an artifact directory and put it into the store (the default one if None).

    `facts` are the keyword arguments of `write_artifact`. The same version with other content is refused (Conflict).
    """
    write_artifact(directory, adapter, model, config, result, **facts)
    return (store or Store()).put(directory)


def publish_learned(
    directory: Path,
    learned: Adapter | Composite,
    model: PreTrainedModel,
    config: TrainConfig,
    result: FitResult,
    *,
    ref: AdapterRef,
    store: Store | None,
    **facts: Any,
) -> Artifact | None:
    """Write what a method stores and, with a store, publish it.

    An adapter lies in `directory`. Of a composite each member lies in a folder below and is published as
    `ns/name-member`, and the whole is a composition of these under `ref`.
    """
    if not isinstance(learned, Composite):
        write_artifact(directory, learned, model, config, result, ref=ref, **facts)
        return store.put(directory) if store is not None else None
    refs = {name: AdapterRef.parse(f"{ref.id}-{name}@{ref.version}") for name in learned.members}
    for name, member in learned.members.items():
        member_facts = {**facts, "summary": f"Part of `{ref}`, which is `{learned.expression}`.", "evaluated_on": None}
        write_artifact(directory / name, member, model, config, result, ref=refs[name], **member_facts)
        if store is not None:
            store.put(directory / name)
    expression = str(substitute(parse(learned.expression), lambda leaf: Ref(str(refs[leaf.text]))))
    (directory / "expression.txt").write_text(expression + "\n", encoding="utf-8")
    if store is None:
        return None
    return publish_composition(
        expression,
        ref,
        AdapterFinder(store),
        license=facts.get("license"),
        method=config.method,
        metrics=_metrics(config, result, facts.get("evaluated_on")),
    )


def write_artifact(
    directory: Path,
    adapter: Adapter,
    model: PreTrainedModel,
    config: TrainConfig,
    result: FitResult,
    *,
    ref: str | AdapterRef,
    data: Mapping[str, str],
    evaluated_on: Dataset | None = None,
    labels: Sequence[str] = (),
    domains: Sequence[str] = (),
    words: Counts | None = None,
    license: str | None = None,
    summary: str = "",
) -> Draft:
    """Write a trained adapter as an artifact directory that is ready for `Store.put`.

    Parameters
    ----------
    ref
        `ns/name@version` of the new artifact.
    data
        What it was trained on: file or data set name -> `sha256:...`.
    evaluated_on
        The held-out rows that `result.best` was measured on; their digest goes into each metric.
    words
        Which words its texts use (see `hub.relations.word_counts`): by these it is found for a text.

    Raises
    ------
    HubError
        A gate refuses the files (NaN, a key that does not resolve), or the directory cannot be written.
    """
    ref = AdapterRef.parse(ref)
    compose.save(adapter, directory, model=model, task=config.task)
    draft = Draft(
        name=ref.id,
        version=ref.version or "0.1.0",
        kind=adapter.kind,
        method=config.method,
        hyperparameters=_hyperparameters(adapter, config, result),
        base=compose.identity(model),
        trained_on=_trained_on(model, config),
        placement=tuple(adapter.paths),
        task=config.task,
        labels=tuple(labels),
        domains=tuple(domains),
        metrics=_metrics(config, result, evaluated_on),
        lineage=Lineage(run=config.digest, data=dict(data)),
        license=license,
        summary=summary,
    )
    probes.write(directory, probes.record(model, adapter))
    if words is not None:
        write_words(directory, {SELF: words})
    write_card(directory / "README.md", draft, trainable=sum(p.numel() for p in adapter.parameters()))
    pack(directory, draft)
    return draft


def next_version(store: Store, name: str) -> str:
    """The version after the highest one of a name in the store: its last part plus one; `0.1.0` for a new name."""
    from packaging.version import Version

    releases = store.catalogue(AdapterRef.parse(name).id).releases
    if not releases:
        return "0.1.0"
    last = Version(releases[-1].version)
    return f"{last.major}.{last.minor}.{last.micro + 1}"


def _hyperparameters(adapter: Adapter, config: TrainConfig, result: FitResult) -> dict[str, Any]:
    """The kind's options and the run's; paths of this machine stay here."""
    run = config.model_dump(mode="json", exclude={"base", "data", "columns", "options", "method", "task"})
    options = adapter.config.model_dump(mode="json", exclude_defaults=True)
    return {"adapter": options, "training": run, "steps": result.steps, "items": result.items}


def _trained_on(model: PreTrainedModel, config: TrainConfig) -> TrainedOn:
    quantization = quantization_of(model)
    nf4 = quantization == "nf4"
    quantized = getattr(model.config, "quantization_config", None)
    return TrainedOn(
        quantization=quantization,
        block_size=_NF4_BLOCK if nf4 else None,
        double_quant=bool(quantized.bnb_4bit_use_double_quant) if nf4 and quantized is not None else None,
        compute_dtype={"fp32": "float32", "bf16": "bfloat16"}[config.precision],
        libraries={name: found for name in _LIBRARIES if (found := _installed(name))},
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree, or an optional library
        return None


def _metrics(config: TrainConfig, result: FitResult, data: Dataset | None) -> tuple[Metric, ...]:
    if result.best is None or data is None:
        return ()
    counts = {"step", "tokens", "rows"}
    measured = {name: value for name, value in result.best.items() if name not in counts and math.isfinite(value)}
    facts = {
        "dataset": Path(data.source).name.removesuffix(" (held out)") or "held out",
        "dataset_digest": data.digest,
        "split": "held-out",
    }
    n = int(data.items.sum())
    return tuple(Metric(**facts, metric=m, value=v, n=n, seeds=(config.seed,)) for m, v in measured.items())
