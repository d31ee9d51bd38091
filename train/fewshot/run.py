"""`hub few-shot` from file to artifact: read, check, split, learn, measure, publish."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import compose
from hub.errors import Conflict, UsageError
from hub.manifest import Draft, Lineage, Metric
from hub.pack import pack
from hub.ref import AdapterRef
from hub.store import Artifact, Store
from train.data.datasets import read_rows
from train.data.files import file_digests
from train.errors import DataError
from train.fewshot.classifier.classifier import FewShotClassifier, load_base
from train.fewshot.classifier.spec import READER
from train.fewshot.examples import (
    Columns,
    Example,
    check_texts,
    count_cut,
    label_names,
    to_examples,
    warn_of_duplicates,
    without_contradictions,
)
from train.fewshot.job import FewShotResult, Job, learn
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import VerbalizerError
from train.fewshot.reading.reader import usable_positions
from train.fewshot.splits import KShot, k_shot
from train.results.card import write_card
from train.results.publish import next_version, write_artifact

__all__ = [
    "FewShotOutcome",
    "Request",
    "free_version",
    "interval",
    "measure",
    "publish",
    "rows_facts",
    "run",
    "split_of",
]

log = logging.getLogger(__name__)
_MOST_TEST = 2000  # rows that are measured on when no test file is given
_DEFAULT_K = 16
_MEASURES = ("accuracy", "f1", "exact", "f1_micro", "pearson", "spearman", "mae")
_STAGED = ("pet", "ipet")


@dataclass(frozen=True)
class Request:
    """What `hub few-shot` was asked for; see its help."""

    data: str
    base: str
    columns: Columns
    k: int | None = None
    seed: int = 13
    method: str = "auto"
    budget: float = 60.0
    test: str | None = None
    unlabeled: str | None = None
    publish: str | None = None
    templates: tuple[str, ...] = ()
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    max_length: int = 128
    writer: str | None = None
    resume: str | None = None
    all_rows: bool = False
    keep_rows: bool = False
    task: str = "classification"
    separator: str | None = None
    parent: AdapterRef | None = None  # what it goes on from


@dataclass(frozen=True)
class FewShotOutcome:
    """A classifier, and what `hub few-shot --json` says of it: its method, its measures, where it was published."""

    classifier: FewShotClassifier
    facts: Mapping[str, Any]


def run(
    request: Request, *, store: Store | None = None, say: Callable[[str], None] = lambda _text: None
) -> FewShotOutcome:
    """Learn and measure; publish where a name was given.

    Raises
    ------
    DataError, UsageError
        The data, a template, a label word or an option is wrong; nothing was trained then.
    """
    started = time.perf_counter()
    method = _method(request, say)
    for template in request.templates:
        Template.parse(template)
    store = store or Store()
    ref = free_version(store, AdapterRef.parse(request.publish)) if request.publish else None
    rows = read_rows(request.data, part="train", without=request.test)
    examples, contradictory = without_contradictions(
        to_examples(rows, request.columns, source=request.data), source=request.data
    )
    split = split_of(request, examples)
    test = _test_rows(request, split)
    unlabeled = _unlabeled(request)
    _refuse_unknown_words(request, split.labels)
    tokenizer = compose.tokenizer(request.base)
    for part, source in (
        (split.train, request.data),
        (test, request.test or request.data),
        (unlabeled, request.unlabeled),
    ):
        check_texts(part, tokenizer, source=str(source))
    twice = warn_of_duplicates(split.train, test, source=request.test or request.data)
    model = load_base(request.base)
    max_length = min(request.max_length, usable_positions(model))
    cut = [
        count_cut(part, tokenizer, max_length, source=str(source))
        for part, source in ((split.train, request.data), (test, request.test or request.data))
    ]
    began = time.process_time()
    job = Job(
        request.base,
        model,
        tokenizer,
        split.train,
        split.labels,
        dev=split.dev,
        unlabeled=unlabeled,
        templates=request.templates,
        words=request.words,
        seed=request.seed,
        budget=request.budget,
        writer=request.writer,
        folder=Path(request.resume) if request.resume else None,
        max_length=max_length,
        say=say,
    )
    learned = learn(job, method)
    learned.classifier.spec = learned.classifier.spec.model_copy(
        update={"columns": (request.columns.text, request.columns.text2), "label": request.columns.label}
    )
    learned.classifier.rows = split.train if request.keep_rows else ()
    learned = replace(learned, facts={**learned.facts, "rows": rows_facts(split.train)})
    seconds = time.process_time() - began
    measured = measure(learned.classifier, test) if test else {}
    facts: dict[str, Any] = {
        "method": learned.method,
        "labels": list(split.labels),
        "train_rows": len(split.train),
        "test_rows": len(test),
        "test_rows_also_in_training": twice,
        "contradictory_rows": contradictory,
        "cut_rows": sum(cut),
        "labels_not_measured": len(set(split.labels) - {str(e.label) for e in test}) if test else 0,
        **measured,
        "learn_seconds": round(seconds, 2),
        **learned.facts,
    }
    if ref is not None:
        artifact = publish(learned, request, ref, {**measured, "n": len(test)}, store)
        facts |= {"ref": str(artifact.ref), "digest": artifact.digest}
    facts["seconds"] = round(time.perf_counter() - started, 2)
    return FewShotOutcome(learned.classifier, facts)


def measure(classifier: FewShotClassifier, test: Sequence[Example]) -> dict[str, Any]:
    """Accuracy with its 95% confidence interval, and macro F1."""
    from train.steps.evaluate import f1_macro

    guess = classifier.logits(test).argmax(1)
    answers = torch.tensor([classifier.labels.index(str(e.label)) for e in test])
    hits = int((guess == answers).sum())
    low, high = interval(hits, len(test))
    f1 = f1_macro(guess, answers)
    return {"accuracy": round(hits / len(test), 4), "interval": [round(low, 4), round(high, 4)], "f1": round(f1, 4)}


def rows_facts(examples: Sequence[Example]) -> dict[str, Any]:
    """How many rows were learned from, and a digest of them that does not depend on their order."""
    lines = sorted(json.dumps([e.text, e.text2, e.label], ensure_ascii=False) for e in examples)
    return {"count": len(lines), "digest": "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval: `(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`, p the share, z = 1.96."""
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def publish(
    learned: FewShotResult, request: Request, ref: AdapterRef, measured: Mapping[str, Any], store: Store
) -> Artifact:
    """Write adapter, head and card, and put them into the store."""
    spec, model = learned.classifier.spec, learned.classifier.model
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        digests = file_digests(request.data, part="train", without=request.test) if request.data else {}
        draft = write_artifact(
            directory, learned.adapter, model, learned.config, learned.result, ref=ref, data=digests, labels=spec.labels
        )
        compose.save(learned.adapter, directory, model=model, task=spec.base_task)
        learned.classifier.write(directory)
        draft = draft.model_copy(
            update={
                "method": f"few-shot/{learned.method}",
                "task": learned.classifier.task,
                "reader": READER,
                "hyperparameters": {**draft.hyperparameters, "few_shot": {"k": request.k, **learned.facts}},
                "lineage": _lineage(draft, request),
                "metrics": _metrics(request, measured, _tested(request)) if measured else (),
                "summary": f"A classifier of {len(spec.labels)} labels: `hub few-shot predict {ref} --text ...`",
            }
        )
        trained = sum(p.numel() for p in learned.adapter.parameters())
        write_card(directory / "README.md", Draft.model_validate(draft.model_dump()), trainable=trained)
        pack(directory, draft)
        return store.put(directory)


def _lineage(draft: Draft, request: Request) -> Lineage | None:
    """Where it comes from, with the classifier that it goes on from."""
    if draft.lineage is None or request.parent is None:
        return draft.lineage
    return draft.lineage.model_copy(update={"parents": (str(request.parent),)})


def _method(request: Request, say: Callable[[str], None]) -> str:
    """The method to run; options that it would not read are refused."""
    if request.unlabeled and request.method == "auto":
        say("--unlabeled: pet labels these texts softly, and a classifier learns from them")
        return "pet"
    if request.unlabeled and request.method not in _STAGED:
        raise UsageError(f"--method {request.method} reads no unlabelled texts", hint="--method pet, or ipet")
    if request.resume and request.method not in _STAGED:
        raise UsageError(f"--method {request.method} has no stages to resume", hint="--resume goes with pet and ipet")
    if request.writer and request.method != "lm-bff":
        raise UsageError(f"--method {request.method} asks no T5 for templates", hint="--method lm-bff")
    return request.method


def free_version(store: Store, name: AdapterRef) -> AdapterRef:
    """The version to publish; one that is taken is refused now, not after the training."""
    if name.version is None:
        return name.at(version=next_version(store, name.id))
    if store.catalogue(name.id).find(version=name.version) is not None:
        hint = f"--publish {name.id} takes the next version"
        raise Conflict(f"{name} is published already; versions are immutable", ref=name, hint=hint)
    return name


def _metrics(request: Request, measured: Mapping[str, Any], digests: Mapping[str, str]) -> tuple[Metric, ...]:
    source = Path(request.test or request.data).name
    n = int(measured.get("n", 0)) or None
    facts: dict[str, Any] = {
        "dataset": source,
        "dataset_digest": next(iter(digests.values())),
        "n": n,
        "seeds": (request.seed,),
    }
    return tuple(Metric(metric=m, value=measured[m], **facts) for m in _MEASURES if m in measured)


def split_of(request: Request, examples: Sequence[Example]) -> KShot:
    """K rows a label; without `--k`, 16 or what the scarcest label allows to a row each."""
    source = request.data
    if request.all_rows:
        if request.k is not None:
            raise UsageError("--k draws rows, and --all-rows takes them all", hint="give one of them")
        return KShot(tuple({e.key: e for e in examples}.values()), (), (), label_names(examples, source=source))
    dev = request.method.startswith("lm-bff") and request.k is not None
    if request.k is not None:
        if request.k < 2:
            raise DataError(f"--k {request.k}: a class is learned from two rows or more", hint="--k 16")
        return k_shot(examples, request.k, request.seed, source=source, dev=dev)
    labels = label_names(examples, source=source)
    counts = Counter(str(e.label) for e in {e.key: e for e in examples}.values())
    short = [label for label in labels if counts[label] < _DEFAULT_K]
    if not short:
        return k_shot(examples, _DEFAULT_K, request.seed, source=source, dev=False)
    log.info("%s: %d of %d labels have fewer than %d rows: all rows train", source, len(short), len(labels), _DEFAULT_K)
    return KShot(tuple({e.key: e for e in examples}.values()), (), (), labels)


def _tested(request: Request) -> dict[str, str]:
    """Digests of what is measured on."""
    return file_digests(request.test, part="test") if request.test else file_digests(request.data, part="train")


def _test_rows(request: Request, split: KShot) -> tuple[Example, ...]:
    if request.test is None:
        return split.rest[:_MOST_TEST]
    rows = to_examples(read_rows(request.test, part="test"), request.columns, source=request.test)
    unseen = sorted({str(e.label) for e in rows} - set(split.labels))
    if unseen:
        raise DataError(
            f"{request.test}: labels unseen in training: {', '.join(unseen[:5])}", hint=f"add rows to {request.data}"
        )
    return tuple(rows)


def _unlabeled(request: Request) -> tuple[Example, ...]:
    if request.unlabeled is None:
        return ()
    return tuple(to_examples(read_rows(request.unlabeled), request.columns, source=request.unlabeled, labelled=False))


def _refuse_unknown_words(request: Request, labels: Sequence[str]) -> None:
    for label in request.words:
        if label not in labels:
            raise VerbalizerError(f"--word names the label {label!r}; the data have {', '.join(labels[:8])}")
