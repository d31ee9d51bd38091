"""Copies, near-copies and quotations are found; different texts are not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.quickstart.neardup import THRESHOLD, distinct, overlap, shingles

WORDS = [f"word{i}" for i in range(400)]


def text(seed: int, length: int = 200) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def test_equals_a_plain_set_of_word_5_grams():
    a, b = text(1), text(1)[:900] + " " + text(2)
    grams = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split())]
    assert [len(shingles(a)), len(shingles(b))] == [len(g) for g in grams]
    assert overlap(shingles(a), shingles(b)) == pytest.approx(
        len(grams[0] & grams[1]) / min(len(grams[0]), len(grams[1]))
    )


def test_case_punctuation_and_layout_do_not_count():
    assert (
        overlap(shingles("The quick, brown fox jumps over"), shingles("the QUICK\n  brown fox -- jumps over!")) == 1.0
    )


@pytest.mark.parametrize("words", ["", "one", "one two three four"])
def test_short_texts_have_one_shingle(words):
    assert len(shingles(words)) == 1


def test_one_licence_with_twenty_holders_is_one_document():
    licence = text(3)
    texts = [f"Copyright 20{i} by holder{i} of place{i}\n\n{licence}" for i in range(20)]
    assert len(distinct([*texts, text(4)])) == 2


def test_a_bundle_falls_before_its_parts_and_ties_nothing_together():
    parts = [text(seed) for seed in range(5)]
    assert distinct(["\n\n".join(parts), *parts]) == [1, 2, 3, 4, 5]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_no_two_that_stay_are_near_duplicates_and_all_that_go_are(seed):
    draw = random.Random(seed)
    texts = [text(draw.randrange(8), draw.randint(20, 300)) for _ in range(15)]
    kept = distinct(texts)
    sets = [shingles(t) for t in texts]
    for i in kept:
        assert all(overlap(sets[i], sets[j]) < THRESHOLD for j in kept if j != i)
    for i in set(range(15)) - set(kept):
        assert any(overlap(sets[i], sets[j]) >= THRESHOLD for j in kept)
