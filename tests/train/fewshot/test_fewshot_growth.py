"""From names alone to few rows to more of them: start, ask, more; several labels a text, and numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from starlette.testclient import TestClient

import train
from hub.cli import main
from hub.errors import HubError, UsageError
from hub.store import Store
from router.engine.engine import Engine
from router.serving.app import create_app
from train import fewshot
from train.errors import DataError
from train.fewshot.classifier.asking import uncertainty
from train.fewshot.reading.independent import thresholds

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"method": "feature", "max_length": 32}


def hub(*args, code=0):
    done = CliRunner().invoke(main, [*map(str, args)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def rows_of(reviews):
    return [(e.text, e.label) for e in reviews]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def moods(n, start=0):
    """Texts whose first word says whether they are good, and whose third whether they are long: two labels or none."""
    rows = []
    for i in range(start, start + n):
        good, plot = i % 2 == 0, (i // 2) % 2 == 0
        text = f"{'good' if good else 'bad'} {'plot' if plot else 'film'} w{i % 20} w{i // 20}"
        rows.append({"text": text, "tags": [name for name, has in (("good", good), ("plot", plot)) if has]})
    return rows


def test_more_rows_go_on_from_a_classifier_that_holds_its_own(review_file, masked_base, reviews_of, tmp_path):
    first = train.few_shot(review_file(), masked_base, k=4, keep_rows=True, publish="me/stars", **OPTIONS)
    old = list(first.classifier.rows)
    assert len(old) == 8 and first.facts["rows"]["count"] == 8
    again = fewshot.load("me/stars")
    assert list(again.rows) == old
    changed = {"text": old[0].text, "label": "pos" if old[0].label == "neg" else "neg"}
    new = [{"text": e.text, "label": e.label} for e in reviews_of(6, 60)]
    file = write(tmp_path / "new.jsonl", [*new, changed, {"text": "a new thing", "label": "odd"}] * 1)
    said = json.loads(hub("few-shot", "more", "me/stars", file, "--json", "-").stdout)
    assert (said["old_rows"], said["new_rows"], said["replaced_rows"]) == (8, 8, 1)
    assert said["train_rows"] == 15 and said["labels"] == ["neg", "odd", "pos"]
    newer = Store().get("me/stars")
    assert str(newer.ref) == said["ref"] == "me/stars@0.1.1"
    assert newer.manifest.lineage.parents == (first.facts["ref"],)
    kept = {e.text: e.label for e in fewshot.load("me/stars").rows}
    assert len(kept) == 15 and kept[old[0].text] == changed["label"]


def test_more_needs_the_rows_of_then_where_they_are_not_held(review_file, masked_base, tmp_path):
    then = review_file()
    first = train.few_shot(then, masked_base, k=4, seed=21, publish="me/stars", **OPTIONS)
    new = review_file(4, 60, "new.jsonl")
    with pytest.raises(UsageError, match=r"learned from 8 rows \(sha256:.*\), which it does not hold") as error:
        fewshot.more("me/stars", new)
    assert "--rows FILE" in str(error.value.hint)
    with pytest.raises(DataError, match=r"are not those that me/stars@0\.1\.0 was learned from"):
        fewshot.more("me/stars", new, rows=review_file(40, 4, "other.jsonl"))
    assert Store().catalogue("me/stars").releases[-1].version == "0.1.0"
    outcome = fewshot.more("me/stars", new, rows=then)
    assert (outcome.facts["old_rows"], outcome.facts["train_rows"]) == (8, 12)
    assert outcome.facts["rows"] != first.facts["rows"]


def test_a_classifier_starts_from_names_and_grows(review_file, masked_base, tmp_path):
    told = hub(
        "few-shot", "start", "--base", masked_base, "--label", "great", "--label", "awful", "--publish", "me/new"
    )
    assert "0 rows, 2 labels" in told.stdout
    start = fewshot.load("me/new")
    assert start.labels == ("awful", "great") and start.predict(["a great film"]) != []
    assert Store().get("me/new").manifest.metrics == ()
    pool = write(tmp_path / "pool.jsonl", [{"id": i, "text": f"the w{i} film"} for i in range(6)] + [{"text": ""}])
    asked = [json.loads(line) for line in hub("few-shot", "ask", "me/new", pool, "--n", "3").stdout.splitlines()]
    assert len(asked) == 3 and len({row["id"] for row in asked}) == 3
    assert all(0 <= row["uncertainty"] <= 1 and row["prediction"] in ("great", "awful") for row in asked)
    labelled = write(tmp_path / "labelled.jsonl", [{"text": r["text"], "label": ("great", "awful")[i % 2]}
                                                   for i, r in enumerate(asked * 2)])  # fmt: skip
    grown = fewshot.more("me/new", labelled, method="feature")
    assert grown.facts["old_rows"] == 0 and grown.facts["ref"] == "me/new@0.1.1"
    with pytest.raises(UsageError, match="2 names of labels, 1 of them different"):
        fewshot.start(["a", "a"], masked_base)
    with pytest.raises(HubError, match="say nothing"):
        fewshot.start(["1", "2"], masked_base)


def test_what_is_asked_for_is_unsure_and_unlike_what_is_known(masked_base, reviews_of):
    made = fewshot.fit(rows_of(reviews_of(16)), masked_base, keep_rows=True, **OPTIONS)
    texts = ["the good w1 film w0", "the film was one two three", "the film was one two three", "a plot . , ! ?"]
    asked = fewshot.ask(made, [*texts, made.rows[0].text], n=5)
    order = [one.row for one in asked]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order.index(4) >= 3  # it has learned from it
    assert abs(order.index(1) - order.index(2)) > 1  # twins: the second adds nothing
    assert torch.allclose(uncertainty("classification", torch.tensor([[0.5, 0.5], [1.0, 0.0]])), torch.tensor([1.0, 0]))
    assert fewshot.ask(made, [], n=3) == []
    with pytest.raises(UsageError):
        fewshot.ask(made, texts, n=0)


def test_texts_have_any_number_of_labels(masked_base, tmp_path):
    data, test = write(tmp_path / "tags.jsonl", moods(64)), write(tmp_path / "test.jsonl", moods(24, 100))
    options = {"task": "multi_label_classification", "label": "tags", "max_length": 32}
    made = train.few_shot(data, masked_base, test=test, publish="me/tags", keep_rows=True, **options)
    assert made.facts["f1_micro"] > 0.9 and made.facts["exact"] > 0.8
    texts = ["good plot w12 w5", "bad film w3 w5"]
    assert made.classifier.predict(texts) == [("good", "plot"), ()]
    shares = made.classifier.predict_proba(texts)
    manifest = Store().get("me/tags").manifest
    assert (manifest.task, manifest.labels) == ("multi_label_classification", ("good", "plot"))
    assert {m.metric for m in manifest.metrics} == {"exact", "f1_micro"}
    # `hub run`, `/v1/classify` and `hub eval` say the same.
    rows = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    hub("run", rows, "--base", masked_base, "--expr", "me/tags", "--out", tmp_path / "out.jsonl", "--scores", "2")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["output"] for row in out] == [["good", "plot"], []]
    with TestClient(create_app(Engine(masked_base, store=Store()))) as client:
        data_of = client.post("/v1/classify", json={"model": "me/tags", "input": texts}).json()["data"]
    assert [one["labels"] for one in data_of] == [["good", "plot"], []]
    served = torch.tensor([[one["scores"][label] for label in made.classifier.labels] for one in data_of])
    torch.testing.assert_close(served.float(), shares, atol=1e-5, rtol=0)
    measured = train.evaluate("me/tags", test, base=masked_base, columns={"label": "tags"})["measures"]
    assert measured["exact"] == pytest.approx(made.facts["exact"], abs=1e-4)
    # Labels in one cell, and more of them.
    table = tmp_path / "tags.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("text", "tags"), *((r["text"], "; ".join(r["tags"])) for r in moods(24))])
    from_cells = train.few_shot(str(table), masked_base, separator=";", **options)
    assert from_cells.classifier.labels == ("good", "plot") and from_cells.facts["cross_validated_f1_micro"] > 0.8
    grown = fewshot.more("me/tags", test)
    assert grown.facts["train_rows"] == 64 + 24 and grown.classifier.predict(texts) == [("good", "plot"), ()]
    for wrong, why in (
        ({"method": "pet"}, "learns one label a text"),
        ({"k": 4}, "--k says nothing to --task"),
        ({"task": "multi"}, "there is no task 'multi'"),
        ({"label": "text"}, "not a list of labels"),
    ):
        with pytest.raises(HubError, match=why):
            train.few_shot(data, masked_base, **{**options, **wrong})


def test_texts_have_a_number(masked_base, tmp_path):
    def rated(n, start=0):
        words = ("awful", "poor", "fine", "good", "great")
        return [{"text": f"{words[i % 5]} film w{i % 20} w{i // 20}", "stars": i % 5 + 1} for i in range(start, n)]

    data = write(tmp_path / "stars.jsonl", rated(80))
    made = train.few_shot(data, masked_base, task="regression", label="stars", publish="me/rate", max_length=32)
    assert made.facts["cross_validated_pearson"] > 0.9 and made.facts["labels"] == []
    low, high = made.classifier.predict(["awful film w1 w3", "great film w1 w3"])
    assert low < 2.7 and high > 3.3
    with TestClient(create_app(Engine(masked_base, store=Store()))) as client:
        (one,) = client.post("/v1/classify", json={"model": "me/rate", "input": "great film w1 w3"}).json()["data"]
    assert one["value"] == pytest.approx(high, abs=1e-4)
    said = hub("few-shot", "predict", "me/rate", "--text", "great film w1 w3").stdout
    assert float(said) == pytest.approx(high, abs=1e-4)
    assert train.evaluate("me/rate", data, base=masked_base, columns={"label": "stars"})["measures"]["spearman"] > 0.9
    with pytest.raises(DataError, match="is not a finite number"):
        train.few_shot(data, masked_base, task="regression", label="text")
    with pytest.raises(DataError, match="every row has the number 3"):
        same = write(tmp_path / "same.jsonl", [{"text": f"w{i}", "label": 3} for i in range(6)])
        train.few_shot(same, masked_base, task="regression")


def test_a_threshold_lies_where_held_out_rows_are_told_apart():
    p = torch.tensor([[0.1], [0.2], [0.3], [0.35], [0.9]])
    assert 0.2 < thresholds(p, torch.tensor([[0], [0], [1], [1], [1]]))[0] <= 0.3
    assert thresholds(torch.tensor([[0.1], [0.9]]), torch.tensor([[0], [1]])) == (0.5,)
