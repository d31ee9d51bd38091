"""`hub few-shot`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import click

from hub.console.output import json_file_option, say, write_json

__all__ = ["few_shot"]

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?")


class _Group(click.Group):
    """`hub few-shot DATA ...` without a verb learns."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb in where there is none."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["learn", *args]
        return super().parse_args(ctx, args)


@click.group("few-shot", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def few_shot() -> None:
    """Learn a classifier from a few labelled rows in seconds.

    \b
    hub few-shot reviews.jsonl --base BASE --text review --label stars --publish acme/stars
    hub few-shot patterns reviews.jsonl --base BASE '{text} It was {mask}.' --word good=great --word bad=terrible
    hub few-shot predict acme/stars --text "Not a dull moment."
    hub few-shot more acme/stars labelled.csv
    hub few-shot learn --help
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _budget(_ctx: click.Context, _option: click.Parameter, value: str) -> float:
    match = _BUDGET.fullmatch(value.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{value!r} is not a time: write 60s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]


def _words(_ctx: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for value in values:
        label, equals, words = value.rpartition("=")
        if not equals or not label or not words.strip():
            raise click.BadParameter(f"{value!r} is not LABEL=WORD[,WORD...]")
        found[label] = tuple(word.strip() for word in words.split(",") if word.strip())
    return found


_word = click.option(
    "--word", "words", multiple=True, callback=_words, metavar="LABEL=WORD[,WORD]", help="Words that stand for a label."
)
_text = click.option("--text", default="text", show_default=True, metavar="COL", help="Column of the text.")
_text2 = click.option("--text2", metavar="COL", help="Column of the second text of a pair.")
_label = click.option("--label", default="label", show_default=True, metavar="COL", help="Column of the label.")
_publish = click.option("--publish", metavar="NS/NAME[@VERSION]", help="Put the classifier into the store.")
_base = click.option(
    "--base", required=True, metavar="BASE", help="A masked LM (best) or another base: directory or id."
)


@few_shot.command("learn")
@click.argument("data")
@_base
@_text
@_text2
@_label
@_word
@click.option("--k", type=int, metavar="K", help="Rows a class [16, or all rows where some class has fewer].")
@click.option("--seed", type=click.IntRange(0), default=13, show_default=True, help="Which rows, and all of training.")
@click.option(
    "--method", default="auto", show_default=True, help="auto, feature, zero-shot, fine-tune, lm-bff, pet, ..."
)
@click.option("--template", "templates", multiple=True, metavar="TEXT", help="Such as '{text} It was {mask}.'")
@click.option("--writer", metavar="T5", help="A T5 that writes templates for lm-bff: directory or id.")
@click.option("--budget", default="60s", show_default=True, callback=_budget, help="Time that learning may take.")
@click.option("--test", metavar="FILE", help="Rows to measure on [the rows of DATA that were not drawn].")
@click.option("--unlabeled", metavar="FILE", help="Texts without labels: with pet and ipet, what is distilled on.")
@click.option("--resume", metavar="DIR", help="Keep the stages of pet and ipet here; a run that was stopped goes on.")
@click.option("--max-length", type=click.IntRange(8), default=128, show_default=True, help="Tokens a row.")
@click.option(
    "--task",
    default="classification",
    show_default=True,
    help="classification; multi_label_classification: any number of labels a text; regression: a number.",
)
@click.option("--separator", metavar="TEXT", help="What divides several labels in one cell, such as ','.")
@click.option("--all-rows", is_flag=True, help="Learn from all rows of DATA, however many; measured on --test alone.")
@click.option("--keep-rows", is_flag=True, help="Put the training rows into the artifact: `more` goes on from them.")
@_publish
@json_file_option
def learn(
    data: str,
    base: str,
    text: str,
    text2: str | None,
    label: str,
    words: dict[str, tuple[str, ...]],
    budget: float,
    json_path: str | None,
    **options: Any,
) -> None:
    """Draw K rows a class from DATA, learn, measure, and publish.

    Templates: {text} {text2} {mask} {sep}, with {text:cut} (drop the last character), {text:lower}, {text:keep}.
    """
    from train import few_shot

    _quiet()
    options |= {"words": words, "budget": budget}
    facts = dict(few_shot(data, base, text=text, text2=text2, label=label, say=say, **options).facts)
    write_json(facts, json_path)
    if json_path != "-":
        _tell(facts, text2)


def _tell(facts: dict[str, Any], text2: str | None) -> None:
    rows, labels = facts["train_rows"], len(facts["labels"])
    of = f"{labels} labels" if labels else "numbers"
    click.echo(f"{facts['method']}: {rows} rows, {of}, {facts['learn_seconds']:.1f} s of learning")
    if "accuracy" in facts:
        low, high = facts["interval"]
        n = facts["test_rows"]
        click.echo(
            f"accuracy {facts['accuracy']:.3f}  (95%: {low:.3f} to {high:.3f}, {n} rows)  macro F1 {facts['f1']:.3f}"
        )
    elif "cross_validated_accuracy" in facts:
        click.echo(f"cross-validated accuracy {facts['cross_validated_accuracy']:.3f} (no test rows)")
    else:
        told = {n: facts.get(n, facts.get(f"cross_validated_{n}")) for n in ("exact", "f1_micro", "pearson", "mae")}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in told.items() if value is not None)
        on = f"{facts['test_rows']} test rows" if facts["test_rows"] else "cross-validated, no test rows"
        if shown:
            click.echo(f"{shown}  ({on})")
    if "went_on_from" in facts:
        say(f"{facts['old_rows']} rows of {facts['went_on_from']}, {facts['new_rows']} new ones")
    if "ref" in facts:
        second = ' --text2 "..."' if text2 else ""
        click.echo(f'published {facts["ref"]}\npredict with: hub few-shot predict {facts["ref"]} --text "..."{second}')


@few_shot.command("start")
@_base
@click.option("--label", "labels", multiple=True, required=True, metavar="NAME", help="A label (repeat it).")
@click.option("--text", default="text", show_default=True, metavar="COL", help="Column that texts will have.")
@click.option("--text2", metavar="COL", help="Column of the second text of a pair.")
@_word
@click.option("--template", "templates", multiple=True, metavar="TEXT", help="Such as '{text} It was {mask}.'")
@click.option("--unlabeled", metavar="FILE", help="Texts without labels, to calibrate on.")
@_publish
@json_file_option
def start(labels: tuple[str, ...], base: str, text2: str | None, json_path: str | None, **options: Any) -> None:
    """Make a classifier of the labels' names alone, from no row; `more` goes on from it.

    \b
    hub few-shot start --base BASE --label good --label bad --publish acme/stars
    hub few-shot ask acme/stars pool.jsonl --n 20
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from train.fewshot import start as start_from_names

    _quiet()
    facts = dict(start_from_names(labels, base, text2=text2, say=say, **options).facts)
    write_json(facts, json_path)
    if json_path != "-":
        _tell(facts, text2)


@few_shot.command("more")
@click.argument("ref")
@click.argument("data")
@click.option("--rows", metavar="FILE", help="What it was learned from, where the artifact does not hold its rows.")
@click.option("--test", metavar="FILE", help="Rows to measure on.")
@click.option("--budget", default="60s", show_default=True, callback=_budget, help="Time that learning may take.")
@click.option("--base", metavar="BASE", help="Where the base lies now [where it was].")
@click.option("--publish", metavar="NS/NAME[@VERSION]", help="Its name [the next version of the old one].")
@json_file_option
def more(ref: str, data: str, json_path: str | None, **options: Any) -> None:
    """Go on from a published classifier with the labelled rows of DATA: old rows and new ones, learned together.

    DATA has the columns of the old rows; a text that was among them has its new label from now on.

    \b
    hub few-shot more acme/stars labelled.csv
    hub few-shot more acme/stars labelled.csv --rows reviews.jsonl     (what it was learned from)
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from train.fewshot import more as go_on

    _quiet()
    facts = dict(go_on(ref, data, say=say, **options).facts)
    write_json(facts, json_path)
    if json_path != "-":
        _tell(facts, None)


@few_shot.command("ask")
@click.argument("ref")
@click.argument("pool")
@click.option("--n", type=click.IntRange(1), default=20, show_default=True, help="Texts to ask for.")
@click.option("--text", metavar="COL", help="Column of the text [as in training].")
@click.option("--text2", metavar="COL", help="Column of the pair [as in training].")
@click.option("--base", metavar="BASE", help="Where the base lies now [where it was].")
@click.option("--out", metavar="FILE", help="Write the rows there: .csv, .tsv or .jsonl [JSON lines to stdout].")
def ask(ref: str, pool: str, n: int, text: str | None, text2: str | None, base: str | None, out: str | None) -> None:
    """Say which rows of POOL are worth most to label next: unsure ones that are unlike each other.

    Each comes as it is, with what the classifier takes it for (`prediction`) and how unsure that is (`uncertainty`, 0
    to 1). The prediction goes into no label column: who labels the rows writes that.
    """
    from train.fewshot import load
    from train.fewshot.classifier.files import ask_file

    _quiet()
    classifier = load(ref, base=base)
    named = (text or classifier.spec.columns[0], text2 or classifier.spec.columns[1])
    lines = ask_file(classifier, pool, named, n=n, out=out)
    if out is None:
        click.echo(lines, nl=False)
    else:
        say(f"the rows to label are in {out}")


@few_shot.command("predict")
@click.argument("ref")
@click.argument("data", required=False)
@click.option("--text", metavar="TEXT", help="One text; with DATA, the column of the text [as in training].")
@click.option("--text2", metavar="TEXT", help="Its pair; with DATA, the column of the pair [as in training].")
@click.option("--base", metavar="BASE", help="Where the base lies now [where it was].")
@click.option("--out", metavar="FILE", help="Write the rows of DATA with their answers: .csv, .tsv or .jsonl.")
@click.option("--into", default="prediction", show_default=True, metavar="COL", help="Column of the answer in --out.")
@click.option("--probabilities", is_flag=True, help="Columns of all labels' probabilities in --out.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of passes.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line a text, with all probabilities.")
def predict(
    ref: str,
    data: str | None,
    text: str | None,
    text2: str | None,
    base: str | None,
    out: str | None,
    into: str,
    probabilities: bool,
    precision: Any,
    as_json: bool,
) -> None:
    """Label one --text, or every row of the file DATA.

    \b
    hub few-shot predict acme/stars --text "Not a dull moment."
    hub few-shot predict acme/stars reviews.csv --out labelled.csv

    Rows keep their columns and their order; one that cannot be read, such as an empty one, says so in its place.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.console.progress import steps_bar
    from hub.errors import UsageError
    from train.fewshot import load
    from train.fewshot.classifier.files import answer, answer_file

    if data is None and text is None:
        raise UsageError("nothing to label", hint=f'hub few-shot predict {ref} --text "..."')
    if data is None and out is not None:
        raise UsageError("--out goes with a file of rows", hint=f"hub few-shot predict {ref} DATA --out {out}")
    _quiet()
    classifier = load(ref, base=base, precision=precision)
    if data is None:
        (scores,) = classifier.scores([(str(text), text2)])
        _say_answer(answer(classifier, scores), as_json=as_json)
        return
    named = (text or classifier.spec.columns[0], text2 or classifier.spec.columns[1])
    with steps_bar() as bar:  # with the time that is left
        step = (lambda done, total: bar("rows", done, total)) if bar else (lambda _done, _total: None)
        told = answer_file(classifier, data, named, out=out, into=into, probabilities=probabilities, step=step)
    if out is None:
        for one in told.answers:
            _say_answer(one, as_json=as_json)
    if out is not None:
        say(f"{len(told.rows) - told.failed:,} of {len(told.rows):,} rows are labelled in {out}")
    elif told.failed:
        say(f"{told.failed:,} of {len(told.rows):,} rows could not be read")


def _say_answer(told: Mapping[str, Any], *, as_json: bool) -> None:
    """One answer on a line of stdout."""
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))
    elif "error" in told:
        click.echo(f"\t\t{told['error']}")
    elif "label" in told:
        click.echo(f"{told['label']}\t{told['probability']:.3f}")
    else:
        click.echo(", ".join(told["labels"]) if "labels" in told else f"{told['value']:.6g}")


@few_shot.command("patterns")
@click.argument("data")
@click.argument("template", nargs=-1)
@_base
@_text
@_text2
@_label
@_word
@click.option("--rows", type=click.IntRange(1), default=2, show_default=True, help="Examples to show.")
def patterns(
    data: str, template: tuple[str, ...], base: str, text: str, text2: str | None, label: str, words: Any, rows: int
) -> None:
    """Show templates filled with rows of DATA, and what the base makes of the label words."""
    from train.fewshot.examples import Columns
    from train.fewshot.prompts.show import show

    _quiet()
    for line in show(data, template, base, Columns(text, text2, label), words, rows):
        click.echo(line)


def _quiet() -> None:
    """No report of what is normal here: a base without a classification head."""
    import warnings

    from compose.base.compatibility import BaseWarning

    warnings.simplefilter("ignore", BaseWarning)
