"""Texts with any number of labels, or with a number: heads on the bare base's views, learned from all rows.

Nothing is drawn and no adapter is trained: what is published leaves the base as it is. Measures without `--test` are
those of cross-validation, over rows that the head which predicts them has not seen; thresholds are chosen on them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import compose
from hub.errors import UsageError, suggest
from hub.ref import AdapterRef
from hub.store import Store
from train.data.cells import CellError, in_order, label_set, number
from train.data.files import Part, read_rows
from train.errors import DataError
from train.fewshot.classifier.classifier import FewShotClassifier, head_member, load_base
from train.fewshot.classifier.spec import Spec
from train.fewshot.examples import Columns, Example, check_texts, no_column, to_examples
from train.fewshot.job import FewShotResult, Job
from train.fewshot.reading.independent import fit_labels, fit_number, thresholds
from train.fewshot.reading.views import View
from train.fewshot.run import FewShotOutcome, Request, free_version, publish, rows_facts
from train.fewshot.splits import folds
from train.result import FitResult
from train.steps.read_texts import answers_of, measure_scores

__all__ = ["TASKS", "read_outputs", "run_outputs"]

TASKS = ("multi_label_classification", "regression")
_FOLDS = 4
_SAYS = "a list of labels, or one text that --separator divides; a number with --task regression"
_FEWEST = 2  # rows that have a label, and that lack it


def run_outputs(
    request: Request, *, store: Store | None = None, say: Callable[[str], None] = lambda _text: None
) -> FewShotOutcome:
    """Learn a request whose task is one of `TASKS`; measure and publish.

    Raises
    ------
    DataError, UsageError
        The rows or an option are wrong; nothing was trained then.
    """
    started = time.perf_counter()
    _refuse_options(request)
    store = store or Store()
    ref = free_version(store, AdapterRef.parse(request.publish)) if request.publish else None
    several, said = request.task == TASKS[0], (request.task, request.separator)
    examples, values = read_outputs(request.data, request.columns, *said, without=request.test)
    labels = tuple(in_order(name for names in values for name in names)) if several else ()
    answers = answers_of(request.task, labels, values, source=request.data)
    _refuse_thin(request, labels, answers)
    tested = None if request.test is None else read_outputs(request.test, request.columns, *said, part="test")
    truth = None if tested is None else answers_of(request.task, labels, tested[1], source=str(request.test))
    tokenizer = compose.tokenizer(request.base)
    for part, source in ((examples, request.data), (tested[0] if tested else (), request.test)):
        check_texts(part, tokenizer, source=str(source))
    job = Job(request.base, load_base(request.base), tokenizer, tuple(examples), labels, seed=request.seed,
              budget=request.budget, max_length=request.max_length, say=say)  # fmt: skip
    began = time.process_time()
    learned, held = _learn(job, request, labels, answers)
    learned.classifier.rows = examples if request.keep_rows else ()
    seconds = time.process_time() - began
    scores = held if tested is None else learned.classifier.scores(tested[0])
    measured = measure_scores(learned.classifier, scores, answers if truth is None else truth)
    measured = {name: round(value, 4) for name, value in measured.items()}
    count = len(tested[0]) if tested else len(examples)
    facts: dict[str, Any] = {
        "method": learned.method,
        "labels": list(labels),
        "train_rows": len(examples),
        "test_rows": count if tested else 0,
        **(measured if tested else {f"cross_validated_{name}": value for name, value in measured.items()}),
        "learn_seconds": round(seconds, 2),
        **learned.facts,
    }
    if ref is not None:
        artifact = publish(learned, request, ref, {**measured, "n": count}, store)
        facts |= {"ref": str(artifact.ref), "digest": artifact.digest}
    return FewShotOutcome(learned.classifier, {**facts, "seconds": round(time.perf_counter() - started, 2)})


def _learn(job: Job, request: Request, labels: tuple[str, ...], answers: Tensor) -> tuple[FewShotResult, Tensor]:
    """The classifier, and (N, C) scores of rows that its heads have not seen."""
    compose.activate(job.model, None)
    templates = [View(t, pool) for t in job.patterns for pool in ("mask", "mean")]
    views = (View(), *templates, *([View(None, "match")] if job.examples[0].text2 is not None else []))
    features = job.reading.features(views, (), job.examples)
    parts = folds(job.examples, min(_FOLDS, len(job.examples)), job.seed)
    several = request.task == TASKS[0]
    found = fit_labels(features, answers, parts) if several else fit_number(features, answers, parts)
    held = found.held.sigmoid() if several else found.held
    member, tensors = head_member(views, found.head, (), adapted=False)
    adapter = job.identity()
    spec = Spec(
        base=job.base,
        task=request.task,
        labels=labels,
        thresholds=thresholds(held, answers) if several else (),
        members=(member,),
        shares=(1.0,),
        max_length=job.reading.max_length,
        base_task="masked_lm" if job.tokenizer.mask_token_id is not None else "causal_lm",
        precision=job.precision,
        columns=(request.columns.text, request.columns.text2),
        label=request.columns.label,
        separator=request.separator,
    )
    classifier = FewShotClassifier(job.model, job.tokenizer, spec, [tensors])
    facts = {"templates": list(job.patterns), "rows": rows_facts(job.examples)}
    return FewShotResult(classifier, adapter, "feature", job.config(1), FitResult(), facts), held


def read_outputs(
    source: str, columns: Columns, task: str, separator: str | None, *, part: Part = "train", without: str | None = None
) -> tuple[list[Example], list[Any]]:
    """Texts of a file with what they say as JSON, and the same as values: tuples of labels, or numbers.

    Raises
    ------
    DataError
        A cell that is none, with its row.
    """
    rows = read_rows(source, part=part, without=without)
    texts = to_examples(rows, columns, source=source, labelled=False)
    values: list[Any] = []
    for place, row in enumerate(rows, 1):
        if columns.label not in row:
            raise no_column(columns.label, row, f"{source}, row {place}")
        cell = row[columns.label]
        try:
            values.append(number(cell) if task == "regression" else label_set(cell, separator))
        except CellError as error:
            raise DataError(f"{source}, row {place}: {columns.label!r} {error}", hint=_SAYS) from error
    told = [json.dumps(list(v) if isinstance(v, tuple) else v, ensure_ascii=False) for v in values]
    return [Example(e.text, e.text2, label) for e, label in zip(texts, told, strict=True)], values


def _refuse_options(request: Request) -> None:
    """UsageError for an option that these tasks do not read."""
    if request.task not in TASKS:
        near = suggest(request.task, ("classification", *TASKS))
        raise UsageError(
            f"there is no task {request.task!r}", hint=near or "tasks: classification, " + ", ".join(TASKS)
        )
    if request.method not in ("auto", "feature"):
        raise UsageError(
            f"--method {request.method} learns one label a text", hint=f"--task {request.task} has its own"
        )
    for name in ("k", "unlabeled", "templates", "words", "writer", "resume"):
        if getattr(request, name):
            raise UsageError(f"--{name} says nothing to --task {request.task}", hint="leave it out: all rows train")
    if request.separator is not None and request.task == "regression":
        raise UsageError("--separator divides labels, and these are numbers", hint="leave it out")


def _refuse_thin(request: Request, labels: Sequence[str], answers: Tensor) -> None:
    """DataError for rows that say nothing to learn."""
    if request.task == "regression":
        if bool((answers == answers[0]).all()):
            raise DataError(f"{request.data}: every row has the number {float(answers[0]):g}", hint="give others, too")
        return
    if not labels:
        raise DataError(f"{request.data}: no row has a label", hint='labels in one text are divided: --separator ","')
    for label, count in zip(labels, answers.sum(0).tolist(), strict=True):
        if not _FEWEST <= count <= len(answers) - _FEWEST:
            raise DataError(
                f"{request.data}: {count} of {len(answers)} rows have the label {label!r}",
                hint=f"each label is learned from {_FEWEST} rows or more that have it, and as many that lack it",
            )
