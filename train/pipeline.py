"""One run from its configuration to a published artifact, and the folder it leaves.

config.yaml          what was run
metrics.jsonl        a line for each step and evaluation
curves.svg, .html    the same, to look at
run.log              what was said
checkpoint.safetensors   while it runs, with `save_every`
adapter/             the artifact: weights, config, README.md (the card), module.json
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from rich.console import Console

import compose
from compose.base.text_config import fill_pad_id
from hub.errors import Conflict
from hub.ref import AdapterRef
from hub.relations.word_counts import count_words
from hub.store import Artifact, Store
from train.config import TrainConfig, make_config
from train.data.batches import Dataset
from train.data.datasets import Splits, load_splits
from train.errors import DataError, NonFiniteLoss
from train.learner.heads import modules_to_save
from train.loop import fit
from train.method import Composite, Method, make_method
from train.result import FitResult
from train.results.folder import learned, run_folder
from train.results.publish import next_version, publish_learned
from train.results.report import new_progress, plot_curves, write_page
from train.results.tracking import tracking
from train.seeds import derive
from train.steps.checkpoint import CHECKPOINT
from train.steps.guards import heads_come_later, is_finite, options_of_the_run, refuse_looking_ahead, refuse_misfit

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from transformers import PreTrainedModel

    from compose.kind.adapter import Adapter
    from hub.relations.word_counts import Counts

__all__ = ["Outcome", "PreparedRun", "prepare", "run"]

_COUNTED = 5_000  # training rows whose words are counted


@dataclass(frozen=True)
class PreparedRun:
    """Everything a run needs before its first step."""

    model: PreTrainedModel
    adapter: Adapter | Composite  # what trains
    tokenizer: Any
    splits: Splits
    method: Method
    config: TrainConfig  # with the method's recipe


@dataclass(frozen=True)
class Outcome:
    """What a run left: the loop's result, the run's folder and, when published, the artifact."""

    result: FitResult
    folder: Path
    artifact: Artifact | None
    shared: int = 0  # held-out rows that say what a training row says

    def as_dict(self) -> dict[str, Any]:
        """Values for scripts."""
        r = self.result
        facts = {"steps": r.steps, "items": r.items, "seconds": round(r.seconds, 3), "stopped": r.stopped}
        facts |= {"held_out_rows_also_in_training": self.shared} if self.shared else {}
        losses = [record["loss"] for record in r.history if "loss" in record]
        found = {"best": r.best, "last_loss": losses[-1] if losses else None, "folder": str(self.folder)}
        named = {"ref": str(self.artifact.ref), "digest": self.artifact.digest} if self.artifact else {}
        return {**named, **found, **facts}


def run(
    config: TrainConfig | Mapping[str, Any],
    *,
    ref: str | AdapterRef | None = None,
    folder: str | Path | None = None,
    store: Store | None = None,
    publishing: bool = True,
    resume: bool = False,
    save_every: int = 0,
    license: str | None = None,
    console: Console | None = None,
    trackers: Sequence[str | GeneralTracker] = (),
) -> Outcome:
    """Train what the configuration says, leave a folder, and publish the best adapter.

    Parameters
    ----------
    config
        The run, or its values (`hub train --fields` lists them).
    ref
        The adapter's name, with a version or the next one; by default `local/` and the method's.
    folder
        The run's folder; by default `runs/` and the adapter's name.
    store
        Where it is published, if it is (`publishing`); by default the user's own.

    Raises
    ------
    UsageError
        The folder holds another run (and `resume` is not set); a tracker is not installed.
    NonFiniteLoss
        The best adapter so far lies in `folder/adapter`, unpublished.
    HubError
        Bad data, an unknown method or option, a base that cannot be loaded.
    """
    accelerator, store = Accelerator(), store or Store()
    _, config = make_method(config if isinstance(config, TrainConfig) else make_config(config))
    ref = AdapterRef.parse(ref or f"local/{config.method.replace('_', '-')}")
    folder = Path(folder or Path("runs") / ref.name)
    ref = _version(store, ref) if publishing else ref.at(version=ref.version or "0.1.0")
    console = console or Console(stderr=True)
    progress = new_progress(console, accelerator)
    with run_folder(folder, config, accelerator, console, resume=resume), progress:
        ready = prepare(config)
        options: dict[str, Any] = {"out": folder, "progress": progress, "save_every": save_every, "resume": resume}
        data = ready.splits
        try:
            with tracking(trackers, config, folder, name=ref.name) as watch:
                options |= {"method": ready.method, "watch": watch}
                result = fit(ready.model, ready.adapter, data.train, data.eval, config, **options)
        except NonFiniteLoss as error:
            if accelerator.is_main_process and is_finite(ready.adapter):
                _leave(folder, ready, config, error.result, ref=ref, store=None, license=license)
                error.hint = f"{error.hint}; what was kept is in {folder / 'adapter'}, unpublished"
            raise
        artifact = None
        if accelerator.is_main_process:
            into = store if publishing else None
            with learned(folder):
                artifact = _leave(folder, ready, config, result, ref=ref, store=into, license=license)
            (folder / CHECKPOINT).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return Outcome(result, folder, artifact, ready.splits.shared)


def prepare(config: TrainConfig) -> PreparedRun:
    """Read the data, load the base and make the adapter, untrained and active.

    Raises
    ------
    DataError
        See `load_splits`; or rows longer than the base can read.
    HubError
        The base, method or an option of it is unknown or does not fit.
    """
    method, config = make_method(config)
    tokenizer = compose.tokenizer(config.base)
    splits = load_splits(config, tokenizer)
    with heads_come_later(config.task not in ("causal_lm", "seq2seq")):
        model = compose.load(
            config.base,
            quantize=config.quantize,
            dtype=config.precision,
            device=Accelerator().device,
            task=config.task,
            labels=splits.train.labels or None,
        )
    fill_pad_id(model.config, splits.train.pad_id)
    if config.task == "causal_lm":
        refuse_looking_ahead(model)
    heads = modules_to_save(model, config.task)
    with options_of_the_run():
        learner = method.build(model, seed=derive(config.seed, "init"), heads=heads, tokenizer=tokenizer)
    members = learner.members.values() if isinstance(learner, Composite) else (learner,)
    for data in (splits.train, splits.eval):
        if data is not None:
            refuse_misfit(model, tokenizer, data, members, hint="max_length={}")
    _check_packing(members, splits.train)
    method.warm(model, learner, splits.train)
    return PreparedRun(model, learner, tokenizer, splits, method, config)


def _words(ready: PreparedRun) -> Counts:
    """Which words the training rows use; those of the first rows are enough."""
    tokens, decode = ready.splits.train.tokens, ready.tokenizer.decode
    rows = range(min(_COUNTED, len(tokens.starts) - 1))
    return count_words(decode(tokens.row(i), skip_special_tokens=True) for i in rows)


def _check_packing(members: Iterable[Adapter], data: Dataset) -> None:
    if "position_ids" in data.columns and any(member.prompt() is not None for member in members):
        raise DataError(
            "a prompt would stand before the first of the packed rows only",
            hint="leave data.packing out, or try prefix",
        )


def _version(store: Store, ref: AdapterRef) -> AdapterRef:
    """The version to publish; one that is taken is refused now, not after the training."""
    if ref.version is None:
        return ref.at(version=next_version(store, ref.id))
    if store.catalogue(ref.id).find(version=ref.version) is not None:
        raise Conflict(f"{ref} is published already; versions are immutable", ref=ref, hint=f"--name {ref.id}")
    return ref


def _leave(
    folder: Path,
    ready: PreparedRun,
    config: TrainConfig,
    result: FitResult,
    *,
    ref: AdapterRef,
    store: Store | None,
    license: str | None,
) -> Artifact | None:
    """Curves and artifact of what was learned; published where there is a store."""
    plot_curves(result.history, folder / "curves.svg", title=ref.id)
    write_page(folder, result.history, title=ref.id)
    return publish_learned(
        folder / "adapter",
        ready.method.finish(ready.model, ready.adapter),
        ready.model,
        config,
        result,
        ref=ref,
        store=store,
        data=ready.splits.digests,
        evaluated_on=ready.splits.eval,
        labels=ready.splits.train.labels,
        words=_words(ready),
        license=license,
    )
