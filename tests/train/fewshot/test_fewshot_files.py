"""Answers from Python and for files: texts, pairs, rows; columns kept; what cannot be read says so in its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from hub.cli import main
from hub.errors import UsageError
from hub.store import Store
from train import fewshot
from train.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")


def rows_of(reviews):
    return [(e.text, e.label) for e in reviews]


@pytest.fixture
def stars(masked_base, reviews_of):
    options = {"method": "feature", "publish": "me/stars", "max_length": 32}
    return fewshot.fit(rows_of(reviews_of(16)), masked_base, **options)


def hub(*args, code=0):
    done = CliRunner().invoke(main, ["few-shot", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_rows_in_memory_are_learned_from_and_every_form_of_a_text_is_read(stars, masked_base, reviews_of):
    assert Store().get("me/stars").manifest.lineage.data.keys() == {"rows.jsonl"}
    again = fewshot.load("me/stars")
    texts = ["the good w1 film", "the bad w2 film"]
    told = again.predict_proba(texts)
    assert torch.equal(told, again.predict_proba([{"text": t, "id": 1} for t in texts]))
    assert torch.equal(told, again.predict_proba([(t,) for t in texts]))
    assert again.predict(texts) == stars.predict(texts)
    assert again.predict([]) == [] and tuple(again.predict_proba([]).shape) == (0, 2)
    for wrong, why in (
        (["a", "  "], "text 2 of 2 is empty"),
        ("a text", "a single text was given"),
        ([{"txt": "a"}], "no column 'text'"),
        ([("a", "b")], "a pair, and single texts are read"),
    ):
        with pytest.raises(DataError, match=why):
            again.predict(wrong)
    pairs = [(e.text, "w1 w2", e.label) for e in reviews_of(8)]
    both = fewshot.fit(pairs, masked_base, test=pairs[:2], method="feature", max_length=32)
    assert both.spec.columns == ("text", "text2")
    assert both.predict([pairs[0][:2]]) == both.predict([{"text": pairs[0][0], "text2": "w1 w2"}])
    with pytest.raises(DataError, match="one text, and pairs are read"):
        both.predict(["a"])
    with pytest.raises(DataError, match=r"row 2 is .*, not \(text, label\)"):
        fewshot.fit([("a", "b"), "c"], masked_base)


def test_a_table_keeps_its_columns_and_an_empty_row_does_not_end_it(stars, tmp_path):
    table = tmp_path / "in.csv"
    table.write_text('id,text,note\n1,the good w1 film,"a, b"\n2,,x\n3,the bad w2 film,\n')
    said = hub("predict", "me/stars", table, "--out", tmp_path / "out.csv", "--probabilities")
    assert "2 of 3 rows are labelled" in said.stderr
    rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    assert [row["id"] for row in rows] == ["1", "2", "3"] and rows[0]["note"] == "a, b"
    assert [rows[0]["prediction"], rows[2]["prediction"]] == stars.predict(["the good w1 film", "the bad w2 film"])
    assert rows[1]["prediction"] == "" and rows[1]["prediction_error"] == "'text' is empty"
    share = stars.predict_proba(["the good w1 film"])[0].tolist()
    assert float(rows[0]["prediction_probabilities_neg"]) == pytest.approx(share[0], abs=1e-5)
    hub("predict", "me/stars", table, "--out", tmp_path / "out.jsonl", "--into", "mood")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0]["mood"] == rows[0]["prediction"] and lines[1]["mood_error"] and lines[2]["note"] == ""
    plain = hub("predict", "me/stars", table).stdout.splitlines()
    assert plain[0].split("\t")[0] == rows[0]["prediction"] and plain[1] == "\t\t'text' is empty" and len(plain) == 3
    for args, why in (
        (("--out", tmp_path / "out.txt"), "says no format"),
        (("--out", tmp_path / "o.csv", "--into", "note"), "has a column 'note' already"),
        (("--text", "txt"), "no column 'txt'"),
    ):
        assert why in hub("predict", "me/stars", table, *args, code=2 if "txt" not in args else 1).output
    assert not Path(tmp_path / "o.csv").exists()
    assert "--out goes with a file" in hub("predict", "me/stars", "--text", "a", "--out", "x.csv", code=2).output
    with pytest.raises(UsageError):
        train.fewshot.answer_file(stars, str(table), out=tmp_path / "x.xls")
