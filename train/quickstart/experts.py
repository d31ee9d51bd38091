"""One expert a domain: found in the store where base, data and settings are the same, else trained and published."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel

import compose
from compose.base.model import identity_of
from hub.relations.word_counts import count_words
from hub.store import Artifact, Store
from train.config import TrainConfig
from train.data.datasets import text_blocks
from train.loop import fit
from train.quickstart.corpus import Document, Domain
from train.results.publish import next_version, publish

NAMESPACE = "quickstart"
CURVE = "aux/curve.json"  # [[step, loss], ...], kept in the artifact so that a report never needs to train again
EVALUATED_CHARS = 2_000  # of each held-out document, for the figure in the artifact's manifest

# Options and peak learning rate at a hidden size of 192, the built-in base's. Wider models need smaller steps.
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, 5e-3),
    "dora": ({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, 5e-3),
    "bottleneck": ({"reduction_factor": 4}, 5e-3),
    "ia3": ({}, 3e-2),
    "bias": ({}, 1e-2),
    "prefix": ({}, 3e-2),
    "prompt": ({}, 5e-2),
}
WIDTH = 192


@dataclass(frozen=True)
class Expert:
    """The adapter of one domain and how it came about."""

    domain: str
    artifact: Artifact
    trained: bool  # False: found in the store
    seconds: float
    curve: tuple[tuple[int, float], ...]  # step, training loss in nats per token


def configuration(base: str, *, quantize: str, kind: str, seed: int, steps: int, width: int) -> TrainConfig:
    """How every expert is trained: short, at a learning rate in proportion to 1 / hidden size."""
    options, rate = RECIPES.get(kind, ({}, 5e-3))
    return TrainConfig(
        base=base,
        quantize=quantize,
        method=kind,
        options=options,
        max_length=256,
        batch_size=4,
        duration=steps,
        lr=float(f"{rate * min(1.0, WIDTH / width):.3g}"),
        warmup=0.1,
        eval_every=0,
        seed=seed,
    )


class Trainer:
    """Makes the experts of a run; the base is loaded when the first one has to be trained.

    Parameters
    ----------
    store
        Where experts are looked for and published: `quickstart/<domain>`, a new version for each new training.
    load
        Loads the base.
    """

    def __init__(self, store: Store, config: TrainConfig, tokenizer: Any, load: Any, progress: Progress) -> None:
        self.store, self.config, self.tokenizer, self.progress = store, config, tokenizer, progress
        self._load = load
        self._model: PreTrainedModel | None = None
        self.fingerprint = identity_of(config.base).weights_fingerprint

    @property
    def model(self) -> PreTrainedModel:
        """The base, loaded on first use."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def expert(self, domain: Domain) -> Expert:
        """Find or train the expert of a domain."""
        published = self.find(domain)
        if published is not None:
            return Expert(domain.name, published, trained=False, seconds=0.0, curve=read_curve(published))
        started = time.perf_counter()
        artifact = self.train(domain)
        return Expert(domain.name, artifact, True, time.perf_counter() - started, read_curve(artifact))

    def find(self, domain: Domain) -> Artifact | None:
        """The published expert with this base, data and configuration, if there is one."""
        for artifact in self.store.list(name=f"{NAMESPACE}/{domain.name}"):
            lineage, base = artifact.manifest.lineage, artifact.manifest.base
            if lineage is None or base is None or base.weights_fingerprint != self.fingerprint:
                continue
            if lineage.run == self.config.digest and dict(lineage.data) == {domain.name: domain.digest}:
                return artifact
        return None

    def train(self, domain: Domain) -> Artifact:
        """Train and publish a new version."""
        size = self.config.max_length
        blocks = text_blocks(self.tokenizer, _texts(domain.train), size, source=domain.name)
        heldout = [text[:EVALUATED_CHARS] for text in _texts(domain.heldout)]
        evaluation = text_blocks(self.tokenizer, heldout, size, source=f"{domain.name} (held out)")
        with ExitStack() as stack:
            adapter = compose.create(
                self.model, self.config.method, self.config.options, name=domain.name, seed=self.config.seed
            )
            stack.callback(compose.detach, self.model, domain.name)
            compose.activate(self.model, domain.name)
            stack.callback(compose.activate, self.model, None)
            result = fit(self.model, adapter, blocks, evaluation, self.config, progress=self.progress)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moduloom-quickstart-")))
            curve = [[record["step"], round(record["loss"], 4)] for record in result.history if "loss" in record]
            (folder / "aux").mkdir()
            (folder / CURVE).write_text(json.dumps(curve), encoding="utf-8")
            return publish(
                folder,
                adapter,
                self.model,
                self.config,
                result,
                store=self.store,
                ref=f"{NAMESPACE}/{domain.name}@{next_version(self.store, f'{NAMESPACE}/{domain.name}')}",
                data={domain.name: domain.digest},
                words=count_words(_texts(domain.train)),
                evaluated_on=evaluation,
                domains=(domain.name,),
                summary=f"Expert for {domain.name}, trained by hub quickstart on {len(domain.train)} documents.",
            )


def read_curve(artifact: Artifact) -> tuple[tuple[int, float], ...]:
    """Training curve of an expert, from its artifact."""
    return tuple((int(step), float(loss)) for step, loss in json.loads(artifact.read(CURVE)))


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]
