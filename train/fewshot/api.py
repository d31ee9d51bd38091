"""Few-shot from Python: learn, start from names alone, go on with more rows, ask which rows to label next."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import compose
from compose.base.at_hand import at_hand
from hub.errors import UsageError
from hub.ref import AdapterRef
from hub.store import Artifact, Store
from train.data.cells import in_order
from train.data.datasets import read_rows
from train.errors import DataError
from train.fewshot.classifier.classifier import FewShotClassifier, head_member, load_base
from train.fewshot.classifier.spec import rows_of, spec_of
from train.fewshot.examples import Columns, Example, check_texts, to_examples
from train.fewshot.job import FewShotResult, Job, learn
from train.fewshot.outputs import read_outputs, run_outputs
from train.fewshot.reading.head import Head
from train.fewshot.reading.views import View
from train.fewshot.recipes.readings import NEARNESS, name_texts, names_of
from train.fewshot.run import FewShotOutcome, Request, free_version, publish, rows_facts, run, split_of
from train.result import FitResult

__all__ = ["few_shot", "fit", "more", "start"]

_SAY_NOTHING = ("N/A", "...", "text", "-")


def few_shot(
    data: str,
    base: str,
    *,
    text: str = "text",
    text2: str | None = None,
    label: str = "label",
    store: Store | None = None,
    say: Callable[[str], None] = lambda _text: None,
    **options: Any,
) -> FewShotOutcome:
    """Learn a classifier from a few labelled rows of a file, measure it and, with `publish`, put it into the store.

    `text`, `text2` and `label` are the file's names of its columns; the other options are those of `Request`.

    Raises
    ------
    DataError, UsageError
        The data, a template, a label word or an option is wrong; nothing was trained then.
    """
    request = Request(data, base, Columns(text, text2, label), **options)
    return (run if request.task == "classification" else run_outputs)(request, store=store, say=say)


def fit(
    rows: str | Path | Sequence[Mapping[str, Any]] | Sequence[Sequence[str]],
    base: str,
    *,
    test: str | Path | Sequence[Mapping[str, Any]] | Sequence[Sequence[str]] | None = None,
    **options: Any,
) -> FewShotClassifier:
    """Learn a classifier from rows in memory, or from a file; the options are those of `few_shot`.

    Rows are mappings by column, or (text, label), or (text, second text, label).

    >>> fit([("Not a dull moment.", "good"), ("I left early.", "bad"), ...], "./bert").predict(["A film."])

    Raises
    ------
    DataError, UsageError
        The rows or an option are wrong; nothing was trained then.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {"rows": _file(rows, Path(folder) / "rows.jsonl"), "test": None}
        if test is not None:
            files["test"] = _file(test, Path(folder) / "test.jsonl")
        if not isinstance(rows, str | Path) and rows and len(rows[0]) == 3 and not isinstance(rows[0], Mapping):
            options = {"text2": "text2", **options}
        return few_shot(str(files["rows"]), base, test=files["test"], **options).classifier


def _file(rows: str | Path | Sequence[Any], place: Path) -> str:
    """The file itself, or one of these rows."""
    if isinstance(rows, str | Path):
        return str(rows)
    names = {2: ("text", "label"), 3: ("text", "text2", "label")}
    written = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) and (isinstance(row, str) or len(row) not in names):
            raise DataError(f"row {number} is {row!r:.60}, not (text, label)", hint='[("a text", "a label"), ...]')
        written.append(row if isinstance(row, Mapping) else dict(zip(names[len(row)], row, strict=True)))
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return str(place)


def more(
    ref: str,
    data: str,
    *,
    rows: str | None = None,
    base: str | None = None,
    publish: str | None = None,
    store: Store | None = None,
    say: Callable[[str], None] = lambda _text: None,
    **options: Any,
) -> FewShotOutcome:
    """Go on from a published classifier with more labelled rows: the old ones and the new ones, learned together.

    Parameters
    ----------
    data
        New rows, with the columns of the old ones. A text that is there already has its new label from now on.
    rows
        The file that it was learned from, where the artifact does not hold its rows: the same are drawn from it, and
        their digest is compared.
    publish
        Default: the next version of its name.
    options
        Fields of `Request`: ``test``, ``budget``, ``words``, ... ; what the classifier says of itself stays.

    Raises
    ------
    UsageError
        The artifact does not hold its rows, and no file of them was given.
    DataError
        Rows that are not those it was learned from, or new ones that cannot be read.
    """
    store = store or Store()
    artifact = store.get(ref)
    spec = spec_of(artifact)
    columns = Columns(*spec.columns, spec.label)
    shared: dict[str, Any] = {"task": spec.task, "separator": spec.separator, "max_length": spec.max_length}
    old, stored = _old_rows(artifact, columns, rows, shared)
    new = _examples(data, columns, shared)
    both = {example.key: example for example in (*old, *new)}
    replaced = len(old) + len({e.key for e in new}) - len(both)
    where = base or (spec.base if artifact.manifest.base is None else at_hand(artifact.manifest.base))
    method = artifact.manifest.method.removeprefix("few-shot/")
    kept = {"method": "auto" if method == "zero-shot" else method, "keep_rows": stored, **shared, **options}
    if spec.task == "classification":
        kept = {"all_rows": True, **kept}
    with tempfile.TemporaryDirectory() as folder:
        file = _file([_row(e, columns, spec.task) for e in both.values()], Path(folder) / "rows.jsonl")
        named: dict[str, Any] = {"text": columns.text, "text2": columns.text2, "label": columns.label}
        name = publish or artifact.ref.id
        outcome = few_shot(file, where, **named, publish=name, parent=artifact.ref, store=store, say=say, **kept)
    facts = {"went_on_from": str(artifact.ref), "old_rows": len(old), "new_rows": len(new), "replaced_rows": replaced}
    return FewShotOutcome(outcome.classifier, {**outcome.facts, **facts})


def _old_rows(
    artifact: Artifact, columns: Columns, file: str | None, shared: Mapping[str, Any]
) -> tuple[Sequence[Example], bool]:
    """What an artifact was learned from, and whether it holds that itself."""
    kept = rows_of(artifact)
    told: Any = artifact.manifest.hyperparameters.get("few_shot")
    recorded: Any = told.get("rows") if isinstance(told, Mapping) else None
    if kept is not None or recorded == rows_facts(()):
        return kept or (), kept is not None
    if file is None:
        what = f"{recorded['count']} rows ({recorded['digest'][:19]}...)" if recorded else "rows"
        raise UsageError(
            f"{artifact.ref} was learned from {what}, which it does not hold",
            ref=artifact.ref,
            hint="give the file of then: --rows FILE; a classifier learned with --keep-rows holds its rows",
        )
    examples = _examples(file, columns, shared)
    training: Any = artifact.manifest.hyperparameters.get("training")
    seed = training.get("seed", 13) if isinstance(training, Mapping) else 13
    k = told.get("k") if isinstance(told, Mapping) else None
    once = list({e.key: e for e in examples}.values())
    method = artifact.manifest.method.removeprefix("few-shot/")
    ways: list[Sequence[Example]] = [examples, once]
    if shared["task"] == "classification":
        ways.append(split_of(Request(file, "", columns, k=k, seed=seed, method=method), examples).train)
    for found in ways:
        if recorded is None or rows_facts(found) == recorded:
            return found, False
    raise DataError(
        f"the rows of {file} are not those that {artifact.ref} was learned from "
        f"({recorded['count']} rows, {recorded['digest'][:19]}...)",
        hint="give the file of then, unchanged",
    )


def _examples(file: str, columns: Columns, shared: Mapping[str, Any]) -> list[Example]:
    if shared["task"] != "classification":
        return read_outputs(file, columns, str(shared["task"]), shared["separator"])[0]
    return to_examples(read_rows(file, part="train"), columns, source=file)


def _row(example: Example, columns: Columns, task: str) -> dict[str, Any]:
    label = example.label if task == "classification" else json.loads(str(example.label))
    pair = {} if columns.text2 is None else {columns.text2: example.text2}
    return {columns.text: example.text, **pair, columns.label: label}


def start(
    labels: Sequence[str],
    base: str,
    *,
    unlabeled: str | None = None,
    text: str = "text",
    text2: str | None = None,
    label: str = "label",
    store: Store | None = None,
    say: Callable[[str], None] = lambda _text: None,
    **options: Any,
) -> FewShotOutcome:
    """A classifier from the names of its labels alone: what the base says of these words, and no row.

    A masked LM reads them at the masks of templates; an encoder without a head for words compares their names with the
    text. Both are calibrated on texts without labels: those of `unlabeled`, else a few that say nothing
    (arXiv:2102.09690). `more` goes on from it.

    Raises
    ------
    DataError, UsageError
        Fewer than two names, or two alike; an option that is wrong; a base that reads no words.
    """
    names = in_order(labels)
    if len(names) < 2 or len(names) < len(labels):
        raise UsageError(f"{len(labels)} names of labels, {len(names)} of them different", hint="--label A --label B")
    store = store or Store()
    request = Request("", base, Columns(text, text2, label), method="zero-shot", **options)
    ref = free_version(store, AdapterRef.parse(request.publish)) if request.publish else None
    examples = [Example(t, t if text2 else None) for t in _SAY_NOTHING]
    if unlabeled is not None:
        examples = to_examples(read_rows(unlabeled), request.columns, source=unlabeled, labelled=False)
    tokenizer = compose.tokenizer(base)
    check_texts(examples, tokenizer, source=str(unlabeled))
    job = Job(base, load_base(base), tokenizer, tuple(examples), tuple(names), templates=request.templates,
              words=request.words, seed=request.seed, budget=request.budget, max_length=request.max_length,
              say=say)  # fmt: skip
    by_names = tokenizer.mask_token_id is not None and not job.masked
    began = time.process_time()
    learned = _by_names(job) if by_names else learn(job, "zero-shot")
    seconds = round(time.process_time() - began, 2)
    learned = replace(learned, facts={**learned.facts, "rows": rows_facts(())})
    learned.classifier.spec = learned.classifier.spec.model_copy(update={"columns": (text, text2), "label": label})
    facts: dict[str, Any] = {"method": learned.method, "labels": names, "train_rows": 0, "test_rows": 0}
    if ref is not None:
        artifact = publish(learned, request, ref, {}, store)
        facts |= {"ref": str(artifact.ref), "digest": artifact.digest}
    return FewShotOutcome(learned.classifier, {**facts, "learn_seconds": seconds, **learned.facts})


def _by_names(job: Job) -> FewShotResult:
    """Cosines of a text's mean state and those of the labels' names, less their mean over the job's texts."""
    if job.examples[0].text2 is not None:
        told = "a name says what one text is about, and not what two have to do with each other"
        raise UsageError(told, hint="label a few pairs: hub few-shot FILE --base BASE")
    compose.activate(job.model, None)
    names = names_of(job)
    if names is None:
        raise UsageError("the labels' names say nothing, or two the same", hint="give words: --word LABEL=WORD")
    weight = NEARNESS * names.states.T
    read = job.reading.features([View()], (), job.examples).states[0]
    adapter = job.identity()
    compose.activate(job.model, None)
    facts = {"names": list(name_texts(job))}
    member = head_member([View()], Head((weight,), -(read @ weight).mean(0), 0.0), (), adapted=False)
    return FewShotResult(job.classifier(member), adapter, "zero-shot", job.config(1), FitResult(), facts)
