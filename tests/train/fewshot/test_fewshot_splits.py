"""K-shot splits, folds, and data that must be refused."""

from __future__ import annotations

import logging

import pytest

from train.errors import DataError
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
from train.fewshot.splits import SEEDS, folds, k_shot, stratified


def test_the_five_splits_are_reproducible_balanced_and_disjoint(reviews_of):
    rows = reviews_of(400)
    seen = set()
    for seed in SEEDS:
        split = k_shot(rows, 16, seed)
        assert split == k_shot(rows, 16, seed)
        assert [e.label for e in split.train].count("pos") == 16 == [e.label for e in split.dev].count("neg")
        keys = [e.key for part in (split.train, split.dev, split.rest) for e in part]
        assert len(keys) == len(set(keys)) == 400
        seen.add(split.train)
    assert len(seen) == 5


def test_a_class_is_drawn_alike_whatever_other_classes_there_are(reviews_of):
    rows = reviews_of(80)
    more = [*rows, *(Example(f"text {i}", None, "other") for i in range(20))]
    mine = [e for e in k_shot(more, 8, 13).train if e.label == "pos"]
    assert mine == [e for e in k_shot(rows, 8, 13).train if e.label == "pos"]


def test_equal_texts_are_drawn_once(reviews_of):
    rows = reviews_of(40)
    again = [Example(e.text.upper() + " ", None, e.label) for e in rows]
    assert len(k_shot([*rows, *again], 4, 13).rest) == 40 - 16


def test_folds_hold_every_row_once_and_every_label(reviews_of):
    parts = folds(reviews_of(32), 4, 13)
    assert sorted(i for part in parts for i in part) == list(range(32))
    assert all(sum(i % 2 == 0 for i in part) == 4 for part in parts)


def test_too_few_rows_name_the_label_and_what_works(reviews_of):
    with pytest.raises(DataError, match="label 'neg' has 4 different rows, 16") as error:
        k_shot([*reviews_of(8), *(Example(f"t{i}", None, "pos") for i in range(20))], 16, 13)
    assert error.value.hint == "--k 4"


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a"] * 5, "every row has the label 'a'"), ([f"c{i}" for i in range(1000)], "1000 different labels")],
)
def test_one_label_and_a_thousand_are_refused(labels, message):
    with pytest.raises(DataError, match=message) as error:
        label_names([Example("x", None, label) for label in labels], source="rows")
    assert error.value.hint


def test_labels_are_ordered_by_value_or_letters():
    assert label_names([Example("x", None, n) for n in ("10", "9", "b", "a")], source="") == ("9", "10", "a", "b")


def test_columns_and_empty_texts_are_named():
    rows = [{"text": "good", "label": 1}, {"text": "  ", "label": 0}]
    with pytest.raises(DataError, match=r"1 empty texts \(rows 2\)"):
        to_examples(rows, Columns(), source="f")
    with pytest.raises(DataError, match="no column 'txt'") as error:
        to_examples(rows[:1], Columns(text="txt"), source="f")
    assert "did you mean 'text'" in str(error.value.hint)
    with pytest.raises(DataError, match="row 1: column 'label' is empty"):
        to_examples([{"text": "good", "label": None}], Columns(), source="f")


def test_a_mask_in_a_text_is_refused(masked_tokenizer):
    with pytest.raises(DataError, match=r"row 2: the text contains \[MASK\]"):
        check_texts([Example("good"), Example("so [MASK]")], masked_tokenizer, source="f")


def test_rows_in_both_train_and_test_are_counted_and_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="train"):
        twice = warn_of_duplicates(
            [Example("A b")], [Example("a  b"), Example("a b"), Example("c")], source="test.jsonl"
        )
    assert twice == 2 and "2 of 3 test rows are also training rows" in caplog.text


def test_what_is_left_is_in_no_order_and_each_beginning_has_all_labels_in_their_shares():
    rows = [Example(f"{label} {i}", None, label) for label, n in (("a", 60), ("b", 30), ("c", 9)) for i in range(n)]
    mixed = stratified(rows, 13)
    assert sorted(e.text for e in mixed) == sorted(e.text for e in rows) and mixed == stratified(rows, 13)
    assert mixed != stratified(rows, 14)
    for n in (3, 11, 33, 66):
        first = [e.label for e in mixed[:n]]
        assert set(first) == {"a", "b", "c"}
        assert all(abs(first.count(x) - n * share / 99) < 1.5 for x, share in (("a", 60), ("b", 30), ("c", 9)))
    rest = k_shot(rows, 4, 13, dev=False).rest
    assert {e.label for e in rest[:3]} == {"a", "b", "c"}


def test_texts_with_two_labels_are_left_out_counted_and_told(caplog):
    rows = [Example("It is fine", None, "bad"), Example("it is  FINE", None, "good"), Example("it is", None, "good")]
    with caplog.at_level(logging.WARNING, logger="train"):
        kept, left_out = without_contradictions([*rows, rows[2]], source="f")
    assert [e.text for e in kept] == ["it is", "it is"] and left_out == 2
    assert "2 rows are left out" in caplog.text and "bad, good" in caplog.text
    with pytest.raises(DataError, match="every text has several labels"):
        without_contradictions(rows[:2], source="f")


@pytest.mark.parametrize("label", ["", "  ", "NaN", float("nan"), ["a", "b"], 0.5])
def test_what_is_no_label_is_refused_by_its_row(label):
    with pytest.raises(DataError, match=r"row 2: 'label' is .*not (a|one) label") as error:
        to_examples([{"text": "good", "label": "a"}, {"text": "bad", "label": label}], Columns(), source="f")
    assert error.value.hint


def test_spaces_around_a_label_are_no_part_of_it():
    rows = [{"text": "good", "label": "pos "}, {"text": "bad", "label": " pos"}, {"text": "so", "label": "neg\n"}]
    assert label_names(to_examples(rows, Columns(), source="f"), source="f") == ("neg", "pos")


@pytest.mark.parametrize("labels", [("\u00b2", "\u00b9"), ("\u2460", "\u2461"), ("--5", "--4"), ("\u0663", "3")])
def test_odd_labels_are_names_like_others(labels):
    rows = [{"text": f"t{i}", "label": labels[i % 2]} for i in range(4)]
    assert set(label_names(to_examples(rows, Columns(), source="f"), source="f")) == set(labels)


def test_texts_that_are_too_long_are_counted(masked_tokenizer, caplog):
    rows = [Example("film " * 5), Example("film " * 20), Example("film " * 30)]
    with caplog.at_level(logging.WARNING, logger="train"):
        assert count_cut(rows, masked_tokenizer, 16, source="f") == 2
    assert "2 of 3 texts are longer than 16 tokens (the longest: 32)" in caplog.text
    pairs = [Example("film " * 10, "film " * 10)]
    assert count_cut(pairs, masked_tokenizer, 22, source="f") == 1 and not count_cut(
        pairs, masked_tokenizer, 23, source="f"
    )
